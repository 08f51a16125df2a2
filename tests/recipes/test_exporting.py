"""Exported models: every tensor comes back, other programs compute the same, and what a format cannot hold is refused."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest
import tokenizers
import torch

from plinth.cli.main import main
from plinth.config import UserError, read_json
from plinth.models.config import DecoderConfig, RopeScaling
from plinth.models.hub import export_tensors, load_model, save_model
from plinth.models.transformer import Transformer
from plinth.recipes.exporting import export_model
from plinth.recipes.parity import CHECK_TEXTS, ask, check_rows, logit_differences
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.gguf import CONTROL, NORMAL, UNUSED, gguf_vocabulary
from plinth.tokenizer.train import SPLIT_PATTERN, train_tokenizer
from tokenizer import published_folders as published

TINY = DecoderConfig(
    vocab_size=420, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=96, max_seq_len=128
)
VARIANTS = {
    "default": TINY,
    "multipliers, untied": dataclasses.replace(
        TINY, tie_embeddings=False, learnable_norm=True, output_multiplier=0.5, attention_multiplier=0.7, norm_eps=1e-5
    ),
}
LLAMA = dataclasses.replace(TINY, qk_norm=False, learnable_norm=True)
SHAPES = {  # of llama.cpp's other architectures
    "llama": LLAMA,
    "llama, untied": dataclasses.replace(LLAMA, num_kv_heads=4, tie_embeddings=False, rope_theta=5e5),
    "llama 3": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", factor=8.0, original_max_seq_len=32)),
    "linear": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", factor=4.0)),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, sliding_window=128, head_dim=16),
    "yarn": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("yarn", factor=4.0, original_max_seq_len=32)),
}
GOLDEN = Path(__file__).with_name("golden_llama_cpp.json")
LLAMA_PYTHON = os.environ.get("PLINTH_LLAMA_PYTHON")  # an interpreter that has llama-cpp-python

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the extra `export` (gguf) is not installed")
needs_llama = pytest.mark.skipif(
    LLAMA_PYTHON is None and importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is absent; PLINTH_LLAMA_PYTHON names it",
)


def random_model(config: DecoderConfig) -> Transformer:
    model, generator = Transformer(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*CHECK_TEXTS, "the cat sat on the mat at 12:45, and the bat sat on the hat. "] * 2, 400)


@pytest.fixture(params=VARIANTS)
def folder(request, tokenizer, tmp_path) -> Path:
    save_model(random_model(VARIANTS[request.param]), tokenizer, tmp_path / "tiny")
    return tmp_path / "tiny"


def read_gguf(path: Path):
    from gguf import GGUFReader

    return GGUFReader(path)


# Half a step of the scale, relative to the largest weight of a block; 4 bits have 8 steps on one side and 7 on the other.
BOUNDS = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 0.51 / 127, "q4_0": 1.01 / 8}


@needs_gguf
@pytest.mark.parametrize("weights", BOUNDS)
def test_every_tensor_comes_back_from_gguf(weights, folder, tmp_path):
    from gguf.quants import dequantize

    done = export_model(folder, tmp_path / "out", format="gguf", weights=weights, check=False)
    assert done.file.name == f"tiny-{weights.upper()}.gguf" and done.size_bytes == done.file.stat().st_size
    model = load_model(folder)
    found = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in read_gguf(done.file).tensors}
    wanted = export_tensors(model)
    assert len(found) == len(wanted)
    for theirs, name in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight"),
        ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        bound = BOUNDS[weights] if wanted[theirs].dim() == 2 else 0.0
        largest = wanted[theirs].abs().max()
        assert (found[name] - wanted[theirs]).abs().max() <= bound * largest * 1.01


@needs_gguf
def test_a_head_at_four_bits_stays_at_eight(folder, tmp_path):
    done = export_model(folder, tmp_path / "out", format="gguf", weights="q4_0", check=False)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read_gguf(done.file).tensors}
    heads = {"token_embd.weight"} if load_model(folder).config.tie_embeddings else {"token_embd.weight", "output.weight"}
    assert {name for name, kind in kinds.items() if kind == "Q8_0"} == heads
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}


@needs_gguf
def test_gguf_says_what_the_model_is(folder, tmp_path):
    config = load_model(folder).config
    fields = read_gguf(export_model(folder, tmp_path / "out", format="gguf", check=False).file).fields
    value = {name: field.contents() for name, field in fields.items()}
    assert value["general.architecture"] == "qwen3" and value["tokenizer.ggml.pre"] == "qwen35"
    assert value["qwen3.block_count"] == 2 and value["qwen3.context_length"] == 128 and value["qwen3.attention.key_length"] == 32
    assert value["qwen3.attention.head_count_kv"] == 2 and value["qwen3.embedding_length"] == 64
    assert value["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(config.norm_eps * config.stream_factor**2)
    assert value["tokenizer.ggml.eos_token_id"] == 0 and value["tokenizer.ggml.eot_token_id"] == 5
    assert value["tokenizer.ggml.add_bos_token"] is False and "<|assistant|>" not in value["tokenizer.chat_template"].split("{%")[0]


def test_vocabulary_by_id(tokenizer):
    vocabulary = gguf_vocabulary(tokenizer, 420)
    assert len(vocabulary.tokens) == len(vocabulary.kinds) == 420 and len(set(vocabulary.tokens)) == 420
    assert vocabulary.kinds[:7] == [CONTROL] * 6 + [NORMAL] and vocabulary.tokens[5] == "<|end|>"
    assert set(vocabulary.kinds[tokenizer.vocab_size :]) == {UNUSED}
    assert len(vocabulary.merges) == tokenizer.vocab_size - 262 and all(merge.count(" ") == 1 for merge in vocabulary.merges)


def changed_tokenizer(tokenizer: Tokenizer, tmp_path: Path, **parts) -> Tokenizer:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(read_json(tmp_path / "tokenizer.json") | parts))
    return Tokenizer.load(tmp_path)


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tokenizer, tmp_path):
    parts = json.loads(tokenizer.backend_json())["pre_tokenizer"]
    parts["pretokenizers"][0]["pattern"]["Regex"] = SPLIT_PATTERN.replace(r"\p{N}|", r"\p{N}{1,2}|")
    with pytest.raises(UserError, match=r"cuts texts by .*\{1,2\}.*--format hf"):
        gguf_vocabulary(changed_tokenizer(tokenizer, tmp_path, pre_tokenizer=parts), 420)
    with pytest.raises(UserError, match="normalizer='Lowercase'"):
        gguf_vocabulary(changed_tokenizer(tokenizer, tmp_path, normalizer={"type": "Lowercase"}), 420)
    with pytest.raises(UserError, match="400 entries, the model vocab_size=300"):
        gguf_vocabulary(tokenizer, 300)
    assert "normal form C" in gguf_vocabulary(changed_tokenizer(tokenizer, tmp_path, normalizer={"type": "NFC"}), 420).notes[0]


def save(config: DecoderConfig, tokenizer: Tokenizer, path: Path) -> Path:
    save_model(random_model(config), tokenizer, path)
    return path


def test_refusals_name_the_field_and_leave_nothing(tokenizer, tmp_path):
    capped = save(dataclasses.replace(TINY, logit_softcap=15.0), tokenizer, tmp_path / "capped")
    with pytest.raises(UserError, match="logit_softcap.*Only Plinth reads"):
        export_model(capped, tmp_path / "out", format="hf")
    plain = save(TINY, tokenizer, tmp_path / "plain")
    with pytest.raises(UserError, match="quantise='q8_0' is no dtype of --format hf"):
        export_model(plain, tmp_path / "out", format="hf", weights="q8_0")
    with pytest.raises(UserError, match="plain exists already"):
        export_model(plain, plain, format="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["capped", "plain"]


@needs_gguf
def test_rows_that_no_block_fits_are_refused(tokenizer, tmp_path):
    odd = save(dataclasses.replace(TINY, intermediate_size=100), tokenizer, tmp_path / "odd")
    with pytest.raises(UserError, match="intermediate_size=100 is not a multiple of 32"):
        export_model(odd, tmp_path / "out", format="gguf", weights="q8_0")
    assert not (tmp_path / "out").exists()


@needs_gguf
@pytest.mark.parametrize("name", SHAPES)
def test_architectures_by_what_they_compute(name, tokenizer, tmp_path):
    done = export_model(save(SHAPES[name], tokenizer, tmp_path / "tiny"), tmp_path / "out", format="gguf", weights="f32", check=False)
    file = read_gguf(done.file)
    kind = name.split()[0].strip(",") if name.startswith(("llama", "qwen2")) else "llama"
    assert file.fields["general.architecture"].contents() == kind
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    wanted = export_tensors(load_model(tmp_path / "tiny"))
    key, ours = tensors["blk.1.attn_k.weight"], wanted["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(key[:4], ours[:4]) == (kind != "llama")
    if kind == "llama":  # row 2i is channel i of the first half, row 2i + 1 that of the second
        assert torch.equal(key[:2], ours[[0, 16]]) and torch.equal(key[32:34], ours[[32, 48]])
    assert ("rope_freqs.weight" in tensors) == (name == "llama 3")
    assert ("blk.0.attn_q.bias" in tensors) == (kind == "qwen2")


@needs_gguf
@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"activation": "geglu"}, "activation: .*no place for these options.*--format hf"),
        ({"sliding_window": 9}, "sliding_window: .*no place for these options"),
        ({"num_experts": 2, "num_active_experts": 1}, "num_experts.*no place for these options"),
        ({"qkv_bias": True}, "num_heads=4 times head_dim=32 is not hidden_size=64"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 32, beta_fast=16.0)}, "beta_fast.*read these differently"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_no_architecture_of_ours_holds_is_refused(option, error, tokenizer, tmp_path):
    folder = save(dataclasses.replace(LLAMA, **option), tokenizer, tmp_path / "odd")
    with pytest.raises(UserError, match=error):
        export_model(folder, tmp_path / "out", format="gguf")


LLAMA_BPE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_llama_bpe(folder: Path) -> Path:
    """Write Llama 3's kind of tokenizer: its cut, pieces that are tokens taken whole, a first token."""
    parts = json.loads(published.byte_level(["<|begin|>", "<|end_of_text|>"]).to_str())
    split = {"type": "Split", "pattern": {"Regex": LLAMA_BPE}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    parts["model"]["ignore_merges"] = True
    backend = published.begun(tokenizers.Tokenizer.from_str(json.dumps(parts)), "<|begin|>")
    return published.write(backend, folder, bos_token="<|begin|>", eos_token="<|end_of_text|>")


PUBLISHED = {
    "headers": ("gpt2", "gpt-2", True),
    "tools": ("gpt2", "gpt-2", False),
    "brackets": ("llama", "default", True),
    "turns": ("llama", "default", True),
    "llama-bpe": ("gpt2", "llama-bpe", True),
}


def with_published_tokenizer(kind: str, folder: Path) -> Path:
    save_model(random_model(LLAMA), None, folder)
    (folder / "plinth.json").unlink()
    return write_llama_bpe(folder) if kind == "llama-bpe" else published.KINDS[kind](folder)


@needs_gguf
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_tokenizers_go_along(kind, tmp_path):
    folder = with_published_tokenizer(kind, tmp_path / "tiny")
    fields = read_gguf(export_model(folder, tmp_path / "out", format="gguf", check=False).file).fields
    value = {name: field.contents() for name, field in fields.items()}
    found = tuple(value[f"tokenizer.ggml.{name}"] for name in ("model", "pre", "add_bos_token"))
    assert found == PUBLISHED[kind]
    tokenizer = Tokenizer.load(folder)
    if tokenizer.prefix_ids:
        assert value["tokenizer.ggml.bos_token_id"] == tokenizer.prefix_ids[0]
    assert value["tokenizer.ggml.eos_token_id"] == tokenizer.end_of_text_id
    if kind == "brackets":
        assert value["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and value["tokenizer.ggml.add_space_prefix"] is True


@needs_gguf
@needs_llama
@pytest.mark.oracle
@pytest.mark.parametrize("kind", PUBLISHED)
def test_llama_cpp_reads_published_tokenizers(kind, tmp_path):
    python = None if LLAMA_PYTHON is None else Path(LLAMA_PYTHON)
    folder = with_published_tokenizer(kind, tmp_path / "tiny")
    check = export_model(folder, tmp_path / "out", format="gguf", weights="f32", python=python).check
    assert check["other_texts"] == [] and check["max_logit_difference"] < 1e-4


@needs_gguf
@needs_llama
@pytest.mark.oracle
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_every_architecture(name, tokenizer, tmp_path):
    python = None if LLAMA_PYTHON is None else Path(LLAMA_PYTHON)
    folder = save(SHAPES[name], tokenizer, tmp_path / "tiny")
    check = export_model(folder, tmp_path / "out", format="gguf", weights="f32", python=python).check
    assert check["max_logit_difference"] < 1e-4 and check["same_best_token"] == 1


def test_differences_of_equal_logits_are_none(tokenizer):
    model, rows = random_model(TINY), check_rows(tokenizer, 128)
    assert len(rows) == 2 and {len(row) for row in rows} == {128}
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(rows))).numpy()
    same = logit_differences(model, rows, logits)
    assert same["max_logit_difference"] == 0 and same["kl_nats"] == 0 and same["same_best_token"] == 1
    shifted = logit_differences(model, rows, logits + 3.0)  # the same distribution
    assert shifted["max_logit_difference"] == pytest.approx(3.0, abs=1e-5) and abs(shifted["kl_nats"]) < 1e-9


def test_hf_export_in_bf16_loads_again(folder, tmp_path):
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--quantise", "bf16", "--no-check"]) == 0
    ours, theirs = load_model(folder), load_model(tmp_path / "out", dtype=torch.bfloat16)
    if not ours.config.has_multipliers:  # folded in and out again, weights are rounded twice
        assert all(torch.equal(a.bfloat16(), b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert Tokenizer.load(tmp_path / "out").sha256 == Tokenizer.load(folder).sha256


@pytest.mark.oracle
def test_transformers_computes_the_same(folder, tmp_path):
    pytest.importorskip("transformers")
    check = export_model(folder, tmp_path / "out", format="hf").check
    assert check["program"] == "transformers" and check["max_logit_difference"] < 1e-4 and check["kl_nats_max"] < 1e-6


def test_our_numbers_are_those_that_llama_cpp_gave(tokenizer):
    """Compare with what llama.cpp computed when the record was made, from the same seeds."""
    golden = read_json(GOLDEN)
    assert [tokenizer.encode(text) for text in CHECK_TEXTS] == golden["ids"]
    for name, config in VARIANTS.items():
        model, rows = random_model(config), check_rows(tokenizer, config.max_seq_len)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(rows)))[:, ::32, ::60]
        assert (logits - torch.tensor(golden["logits"][name])).abs().max() < 1e-4


@needs_gguf
@needs_llama
@pytest.mark.oracle
@pytest.mark.parametrize("weights, bound", [("f32", 1e-6), ("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 1e-2), ("q4_0", 0.3)])
def test_llama_cpp_computes_the_same(weights, bound, folder, tmp_path):
    python = None if LLAMA_PYTHON is None else Path(LLAMA_PYTHON)
    check = export_model(folder, tmp_path / "out", format="gguf", weights=weights, python=python).check
    assert check["program"] == "llama_cpp" and -1e-6 < check["kl_nats"] < bound
    assert weights != "f32" or check["max_logit_difference"] < 1e-4


@needs_gguf
@needs_llama
@pytest.mark.oracle
def test_the_record_is_what_llama_cpp_gives(tokenizer, tmp_path):
    """Delete the record to make it anew with this test."""
    import numpy as np

    python, found = None if LLAMA_PYTHON is None else Path(LLAMA_PYTHON), {"logits": {}}
    for name, config in VARIANTS.items():
        folder = save(config, tokenizer, tmp_path / name)
        file = export_model(folder, tmp_path / f"{name} out", format="gguf", weights="f32", check=False).file
        rows = check_rows(tokenizer, config.max_seq_len)
        np.savez(tmp_path / "rows.npz", input_ids=rows)
        question = {"path": str(file), "inputs": str(tmp_path / "rows.npz"), "output": "logits", "texts": CHECK_TEXTS}
        answer = ask("llama_cpp", question | {"answer": str(tmp_path / "l.npy")}, python)
        found |= {"ids": answer["ids"], "version": answer["version"]}
        found["logits"][name] = np.round(np.load(tmp_path / "l.npy")[:, ::32, ::60], 6).tolist()
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    golden = read_json(GOLDEN)
    assert found["ids"] == golden["ids"]
    assert all(np.abs(np.array(found["logits"][name]) - np.array(golden["logits"][name])).max() < 1e-4 for name in VARIANTS)
