"""Published models made usable: what is copied, what is refused and how, the hub, and every verb on what was imported."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from plinth.cli.main import main
from plinth.config import UserError, read_json
from plinth.inference.grammar import Grammar
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextEngine
from plinth.models.config import DecoderConfig
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.hub import FORMATS, load_model, save_model
from plinth.models.transformer import Transformer
from plinth.recipes.importing import import_model
from plinth.tokenizer.chat import Message
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.published_files import build_tokenizer
from recipes.hub_server import COMMIT, hub
from tokenizer import published_folders as published

TINY = DecoderConfig(
    vocab_size=360, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48, max_seq_len=128,
    learnable_norm=True,
)  # fmt: skip


def publish(folder: Path, kind: str = "headers", config: DecoderConfig = TINY) -> Path:
    """Write a decoder with another project's tokenizer, as it lies on the hub: without our record of hashes, in two files."""
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    save_model(model, None, folder)
    published.KINDS[kind](folder)
    (folder / "plinth.json").unlink()
    (folder / "generation_config.json").unlink()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        safetensors.torch.save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "README.md").write_text("a model card")
    return folder


@pytest.fixture
def source(tmp_path):
    return publish(tmp_path / "published")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    import_model(str(publish(folder / "published")), folder / "model", parity=False)
    return folder / "model"


def test_the_files_are_copied_as_they_are_with_their_hashes_and_their_origin(source, tmp_path):
    (source / "modeling_custom.py").write_text("print('code of the model')")
    (source / "optimizer.pt").write_bytes(b"x")
    done = import_model(str(source), tmp_path / "out", parity=False)
    assert (done.family, done.model_type, done.revision) == ("decoder", "qwen3", None)
    left = {path.name for path in source.iterdir()} - {path.name for path in done.path.iterdir()}
    assert left == {"modeling_custom.py", "optimizer.pt"}
    record = read_json(done.path / "plinth.json")
    assert record["imported"] == {"source": str(source), "revision": None}
    assert set(record["sha256"]) == {path.name for path in done.path.iterdir()} - {"plinth.json"}
    before, after = load_model(source), load_model(done.path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert done.parameters == sum(p.numel() for p in before.parameters())
    (done.path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json"):
        load_model(done.path)


def broken(source: Path, change) -> Path:
    change(source)
    return source


def without_weights(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def set_config(**fields):
    return lambda source: (source / "config.json").write_text(json.dumps(read_json(source / "config.json") | fields))


def truncate(source: Path) -> None:
    file = source / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_tensors(change):
    def apply(source: Path) -> None:
        file = source / "model-00001-of-00002.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)

    return apply


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (without_weights, "pytorch_model.bin: loading a pickled file can run any code .* --revision"),
        (truncate, "model-00002-of-00002.safetensors is truncated or not a safetensors file"),
        (set_config(model_type="mamba"), "model_type='mamba' is not supported. Supported: .*qwen3"),
        (set_config(num_attention_heads=0), "num_heads=0 must be at least 1|division"),
        (set_config(num_key_value_heads=3), "num_heads=2 is not a multiple of num_kv_heads=3"),
        (set_config(vocab_size="many"), "config.json"),
        (set_config(num_hidden_layers=10**9), "holds 24 tensors, but its config.json says 1000000000 layers"),
        (set_config(rope_theta=-1.0, rope_parameters=None), "rope_theta=-1.0 must be positive"),
        (set_config(hidden_size=64), "and [0-9]+ more"),
        (lambda source: (source / "model-00001-of-00002.safetensors").unlink(), "model-00001-of-00002.safetensors does not exist"),
        (lambda source: (source / "config.json").unlink(), "config.json does not exist"),
        (lambda source: (source / "config.json").write_text("[1]"), "model_type=None is not supported"),
        (lambda source: (source / "tokenizer.json").write_text("{"), "tokenizer.json is not a tokenizer"),
        (change_tensors(lambda t: t.pop("model.layers.0.mlp.up_proj.weight")), "lacks the tensor model.layers.0.mlp.up_proj.weight"),
        (change_tensors(lambda t: t.update({"extra.weight": torch.ones(2)})), "no place for: extra.weight"),
        (change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(9)})), r"(both hold|has shape \(9,\))"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(source, change, error, tmp_path):
    broken(source, change)
    with pytest.raises(UserError, match=error):
        import_model(str(source), tmp_path / "out", parity=False)
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["published"]


def test_every_architecture_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
    missing = [name for format in FORMATS.values() for name in format.model_types if f"`{name}`" not in page]
    assert not missing


def test_verbs_that_need_a_decoder_say_what_an_encoder_goes_with(tmp_path, capsys):
    config = EncoderConfig(vocab_size=360, hidden_size=16, num_layers=1, num_heads=1, intermediate_size=16, max_seq_len=32)
    save_model(EncoderModel(config).init_weights(torch.Generator().manual_seed(0)), None, tmp_path / "bert")
    published.write(published.word_pieces(), tmp_path / "bert")
    (tmp_path / "bert" / "plinth.json").unlink()
    for verb in (["generate", "--prompt", "x"], ["chat"], ["export", "--format", "gguf", "--out", str(tmp_path / "out")]):
        assert main([verb[0], str(tmp_path / "bert"), *verb[1:]]) == 1
        assert "holds a model of the family encoder; this needs a decoder. It goes with plinth fill" in capsys.readouterr().err


def test_a_name_that_is_neither_a_folder_nor_an_id(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor an id"):
        import_model("../no/such/folder", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UserError, match="out exists already"):
        import_model("org/name", tmp_path / "out")


FETCH = """
import sys
from pathlib import Path
from plinth.cli.main import main
folder, source = Path(sys.argv[1]), Path(sys.argv[2])
first = main(["import", "org/tiny", "--out", str(folder / "out"), "--no-check", "--json"])
second = main(["import", "org/other", "--out", str(folder / "other"), "--no-check"])
for path in source.glob("*.safetensors*"):
    path.unlink()
(source / "pytorch_model.bin").write_bytes(b"cos")
print(first, second, main(["import", "org/tiny", "--out", str(folder / "old"), "--revision", "old", "--no-check"]), file=sys.stderr)
"""


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="the extra `hub` is not installed")
def test_a_model_of_the_hub_is_fetched_without_its_code(source, tmp_path):
    (source / "modeling_custom.py").write_text("print('code of the model')")
    asked: list[str] = []
    with hub(source, "org/tiny", asked) as address:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", FETCH, str(tmp_path), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment | {"HF_HUB_DISABLE_XET": "1"})
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["revision"] == COMMIT and report["source"] == "org/tiny" and report["model_type"] == "qwen3"
    assert read_json(tmp_path / "out" / "plinth.json")["imported"] == {"source": "org/tiny", "revision": COMMIT}
    assert not any("modeling_custom" in path or "pytorch_model" in path for path in asked)
    assert "org/other cannot be fetched" in done.stderr and "pytorch_model.bin: loading a pickled file" in done.stderr
    assert done.stderr.splitlines()[-1] == "0 1 1"


def test_an_imported_model_generates_and_its_prompt_begins_as_its_tokenizer_says(imported, capsys):
    assert main(["generate", str(imported), "--prompt", "the cat", "--max-tokens", "5", "--temperature", "0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = Tokenizer.load(imported)
    assert answer["completions"][0]["prompt_tokens"] == 1 + len(tokenizer.encode("the cat"))


def test_an_imported_model_is_finetuned_and_published_with_its_own_template(imported, tmp_path, capsys):
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the cat"}]
    (tmp_path / "messages.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 4)
    options = ["--messages", str(tmp_path / "messages.jsonl"), "--out", str(tmp_path / "run")]
    sizes = ["--epochs", "1", "--conversations-per-step", "4", "--micro-batch-size", "4"]
    assert main(["sft", str(imported), *options, *sizes]) == 0
    before, after = Tokenizer.load(imported), Tokenizer.load(tmp_path / "run" / "model")
    assert after.chat_template() == before.chat_template() and after.sha256 == before.sha256 and after.end_ids == before.end_ids
    config = read_json(tmp_path / "run" / "model" / "config.json")
    assert config["bos_token_id"] == before.prefix_ids[0] and before.token_id("<|eot_id|>") in config["eos_token_id"]
    assert main(["generate", str(tmp_path / "run"), "--chat", "--prompt", "Hello", "--max-tokens", "3", "--json"]) == 0
    with pytest.raises(UserError, match="join_turns=2"):
        from plinth.posttraining.sft import train_sft
        from plinth.posttraining.sft_config import SftConfig

        train_sft(tmp_path / "joined", imported, tmp_path / "messages.jsonl", SftConfig(join_turns=2))


@pytest.mark.parametrize("kind", published.KINDS)
def test_an_imported_model_chats_and_keeps_to_a_schema(kind, tmp_path):
    done = import_model(str(publish(tmp_path / "published", kind)), tmp_path / "model", parity=False)
    engine = TextEngine.load(done.path)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=1)
    asked: list[Message] = [{"role": "user", "content": "Hello"}]
    answer = engine.chat([asked], params, Grammar.json_schema(schema))[0]
    assert answer.valid, (answer.text, answer.why_invalid)
    free = engine.chat([asked], params)[0]
    assert "".join(delta.text for delta in engine.stream_chat(asked, params)) == free.text
    assert set(engine.tokenizer.end_ids) <= set(engine.engine.eos_ids)


def test_older_tokenizer_files_are_read_and_sentencepiece_is_refused(tmp_path):
    for kind, made in (("bytes", published.byte_level(["<|endoftext|>"])), ("words", published.word_pieces())):
        folder = tmp_path / kind
        folder.mkdir()
        made.model.save(str(folder))
        if kind == "bytes":
            (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": made.token_to_id("<|endoftext|>")}))
        built = build_tokenizer(folder)
        for text in ("The cat sat on the mat.", "Grüße  aus\nKöln"):
            assert built.encode(text) == made.encode(text, add_special_tokens=False).ids
        assert built.special_ids == {i for i, token in made.get_added_tokens_decoder().items() if token.special}
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="sentencepiece's own file"):
        build_tokenizer(tmp_path / "pieces")
    assert build_tokenizer(tmp_path) is None


@pytest.mark.oracle
def test_transformers_computes_the_same_of_an_imported_model(source, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main(["import", str(source), "--out", str(tmp_path / "out"), "--json"]) == 0
    check = json.loads(capsys.readouterr().out.splitlines()[-1])["check"]
    assert check["program"] == "transformers" and check["max_logit_difference"] <= 1e-5 * check["scale"] and check["kl_nats_max"] < 1e-6
    assert check["other_texts"] == []
