"""Model folders: bit-identical round trips, the same numbers in transformers, and damage that is named."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from plinth.config import UserError, read_json
from plinth.models.config import DecoderConfig
from plinth.models.hub import export_tensors, load_model, save_model
from plinth.models.transformer import Transformer
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer

TINY = DecoderConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48, max_seq_len=64
)
VARIANTS = {
    "default": TINY,
    "learnt norms": dataclasses.replace(TINY, learnable_norm=True, rope_theta=50_000.0),
    "untied, ungrouped": dataclasses.replace(TINY, tie_embeddings=False, num_kv_heads=4, norm_eps=1e-5, learnable_norm=True),
    "multipliers": dataclasses.replace(TINY, output_multiplier=0.25, attention_multiplier=0.5**0.5, norm_eps=1e-2),
    "multipliers, untied": dataclasses.replace(TINY, tie_embeddings=False, output_multiplier=0.125, attention_multiplier=0.5),
}


def random_model(config: DecoderConfig) -> Transformer:
    model, generator = Transformer(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat and the hat, the bat and the rat"] * 3, 280)


@pytest.fixture
def folder(tokenizer, tmp_path):
    save_model(random_model(TINY), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def forget_hashes(folder) -> None:
    (folder / "plinth.json").unlink()


def edit_config(folder, **fields) -> None:
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | fields))
    forget_hashes(folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_bit_identical(name, tmp_path):
    model = random_model(VARIANTS[name])
    save_model(model, None, tmp_path / "one")
    loaded = load_model(tmp_path / "one")
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    save_model(loaded, None, tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_dtype_of_loading_and_of_what_is_saved(tmp_path):
    model = random_model(TINY).bfloat16()
    save_model(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "model/model.safetensors").values()} == {torch.float32}


def test_fused_rows_land_where_the_names_say():
    model = random_model(TINY)
    tensors = export_tensors(model)
    qkv, gate_up = model.layers[1].attention.qkv.weight, model.layers[1].mlp.gate_up.weight
    assert torch.equal(tensors["model.layers.1.self_attn.q_proj.weight"], qkv[:64])
    assert torch.equal(tensors["model.layers.1.self_attn.k_proj.weight"], qkv[64:96])
    assert torch.equal(tensors["model.layers.1.self_attn.v_proj.weight"], qkv[96:])
    assert torch.equal(tensors["model.layers.1.mlp.gate_proj.weight"], gate_up[:48])
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], gate_up[48:])
    assert torch.equal(tensors["model.norm.weight"], torch.ones(32))


def test_generation_stops_at_both_ends(folder):
    generation = read_json(folder / "generation_config.json")
    assert generation["eos_token_id"] == [0, 5]
    assert (generation["pad_token_id"], generation["bos_token_id"]) == (1, 0)
    assert read_json(folder / "config.json")["eos_token_id"] == [0, 5]


def test_sharded_weights_load(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names, (first, second) = sorted(tensors), ("model-1.safetensors", "model-2.safetensors")
    before = load_model(folder).state_dict()
    weight_map = {name: (first if i % 2 else second) for i, name in enumerate(names)}
    for file in (first, second):
        safetensors.torch.save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    forget_hashes(folder)
    after = load_model(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("position", [3, 200, -1])
def test_a_flipped_byte_is_named(folder, position):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[position] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors was damaged or changed: its SHA-256"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 5, 400, -1])
def test_a_truncated_file_is_named_with_and_without_hashes(folder, size):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(UserError, match="damaged or changed"):
        load_model(folder)
    forget_hashes(folder)
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_model(folder)


def rewrite(folder, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    forget_hashes(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "lacks the tensor model.layers.1.self_attn.k_proj.weight"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}), r"1 tensor\(s\) that its config.json has no place for"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight has shape \(31,\); its config.json says \(32,\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.full((32,), 2.0)}),
            "model.norm.weight is not 1 everywhere",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "quantised weights are not supported"),
        (lambda t: t.update({"lm_head.weight": torch.ones(300, 32)}), "ties lm_head.weight to model.embed_tokens.weight, but they differ"),
    ],
)
def test_wrong_tensors_are_named(folder, change, error):
    rewrite(folder, change)
    with pytest.raises(UserError, match=error):
        load_model(folder)


def test_a_tied_head_that_is_written_out_is_accepted(folder):
    before = load_model(folder).state_dict()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert load_model(folder).state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported. Supported: silu"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic' is not supported .its frequencies change as a text grows"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported. Supported: default, linear"),
        ({"num_hidden_layers": 3}, "lacks 11 tensors: model.layers.2.*and 6 more"),
    ],
)
def test_an_unsupported_configuration_is_named(folder, fields, error):
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=error):
        load_model(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        load_model(tmp_path / "nowhere")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is missing, and plinth.json names it"):
        load_model(folder)
    forget_hashes(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        load_model(folder)


def test_saving_replaces_a_model_but_nothing_else(tokenizer, tmp_path):
    target = tmp_path / "model"
    save_model(random_model(TINY), tokenizer, target)
    save_model(random_model(TINY), None, target)
    assert not (target / "tokenizer.json").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(UserError, match="letters holds files, but no model"):
        save_model(random_model(TINY), tokenizer, tmp_path / "letters")
    with pytest.raises(UserError, match="the tokenizer has 277 entries, the model vocab_size=270"):
        save_model(random_model(dataclasses.replace(TINY, vocab_size=270)), tokenizer, tmp_path / "small")
    assert (tmp_path / "letters" / "dear.txt").exists() and not (tmp_path / "small").exists()


@pytest.mark.oracle
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_gives_the_same_logits(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(VARIANTS[name])
    save_model(model, None, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = (theirs(tokens).logits - model.logits(model(tokens))).abs().max().item()
    assert difference <= 1e-4


@pytest.mark.oracle
def test_transformers_chats_with_the_same_ids_and_the_same_greedy_text(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs, their_tokenizer = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    messages = [{"role": "user", "content": "the cat?"}]
    prompt = render(tokenizer, messages, add_generation_prompt=True).tokens
    encoded = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert encoded["input_ids"][0].tolist() == prompt
    generated = theirs.generate(**encoded, max_new_tokens=20, do_sample=False)[0].tolist()
    model, tokens = load_model(folder), list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + 20 and (len(tokens) == len(prompt) or tokens[-1] not in (0, 5)):
            tokens.append(model.logits(model(torch.tensor([tokens])))[0, -1].argmax().item())
    assert generated == tokens
    assert their_tokenizer.decode(generated[len(prompt) :], skip_special_tokens=True) == tokenizer.decode(tokens[len(prompt) :])


@pytest.mark.oracle
def test_transformers_stops_at_the_end_of_a_message(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(dataclasses.replace(TINY, tie_embeddings=False))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[tokenizer.end_id] = model(torch.tensor([[3, 10, 5, 4]]))[0, -1]  # the largest score after this prompt
    save_model(model, tokenizer, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    generated = theirs.generate(torch.tensor([[3, 10, 5, 4]]), max_new_tokens=8, do_sample=False)
    assert generated[0].tolist() == [3, 10, 5, 4, tokenizer.end_id]


@pytest.mark.oracle
def test_a_model_that_transformers_wrote_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    shape = {"vocab_size": 90, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen3Config(**shape, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, max_position_embeddings=32)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model, tokens = load_model(tmp_path), torch.arange(30).view(1, 30)
    with torch.no_grad():
        assert (theirs(tokens).logits - model.logits(model(tokens))).abs().max().item() <= 1e-4


def test_a_model_may_be_loaded_as_it_is_stored(tmp_path):
    model = random_model(DecoderConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16))
    save_model(model, None, tmp_path / "half", torch.bfloat16)
    stored, wide = load_model(tmp_path / "half", None), load_model(tmp_path / "half")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16} and {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(stored.parameters(), wide.parameters()))
