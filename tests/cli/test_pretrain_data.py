"""`plinth pretrain` on several shards folders, through the real command line."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from e2e.command import last_json, plinth
from plinth.data.shards import pack_corpus
from plinth.tokenizer.train import train_tokenizer

WORDS = ["harbour", "lantern", "orchard", "granite", "willow", "copper"]
MODEL = (
    "--model.hidden-size", "32", "--model.num-layers", "1", "--model.num-heads", "2", "--model.num-kv-heads", "2", "--model.head-dim", "16",
    "--model.intermediate-size", "48", "--seq-len", "32", "--sequences-per-step", "8", "--micro-batch-size", "4",
)  # fmt: skip


def write_corpus(folder, texts, kind):
    folder.mkdir()
    for split, part in (("train", texts), ("heldout", texts[:2])):
        pq.write_table(pa.table({"text": part, "kind": [kind] * len(part)}), folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two shards folders, web and code, and their tokenizer."""
    root = tmp_path_factory.mktemp("packed")
    web = [f"Note {i}: the {WORDS[i % 6]} stands by the {WORDS[i * 5 % 6]}. " * (1 + i % 4) for i in range(30)]
    code = [f"def f{i}(x):\n    return x * {i} + {i * 7 % 11}\n" * (1 + i % 3) for i in range(20)]
    tokenizer = train_tokenizer(web + code, vocab_size=300)
    (root / "tokenizer").mkdir()
    tokenizer.save(root / "tokenizer")
    for name, texts in (("web", web), ("code", code)):
        write_corpus(root / f"{name}_corpus", texts, name)
        pack_corpus(root / f"{name}_corpus", tokenizer, root / name)
    return root


def pretrain(root, out, *options, **keywords):
    return plinth("pretrain", root / "web", root / "code", "--tokenizer", root / "tokenizer", "--out", out, *MODEL, *options, **keywords)


@pytest.mark.slow
def test_a_mixture_is_accounted_for_and_its_steps_can_be_looked_at(packed, tmp_path):
    options = ("--shard-weights", "3", "1", "--packing", "best_fit", "--mask-documents", "--train.steps", "40")
    output, errors = pretrain(packed, tmp_path / "run", *options, "--json")
    summary = last_json(output)
    web, code = summary["data"]
    assert web["shards"].endswith("web") and code["shards"].endswith("code")
    assert 2 < (web["tokens_unique"] + web["tokens_repeated"]) / (code["tokens_unique"] + code["tokens_repeated"]) < 4
    assert "would be read" in errors and "2305.16264" in errors
    assert 0 <= summary["padding"] < 0.2
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["epochs"] == pytest.approx(summary["epochs"]) and records[0]["epochs"] < records[-1]["epochs"]

    shown, _ = plinth(
        "pretrain", packed / "web", packed / "code", "--tokenizer", packed / "tokenizer", "--out", tmp_path / "run", "--show-batch", "3"
    )
    assert shown.count("--- row") == 8 and f"(web) of {packed / 'web'}, tokens 0-" in shown
    assert "stands by the" in shown
    padding = sum(int(line.split()[0][1:]) for line in shown.splitlines() if line.endswith("positions of padding]"))
    assert 8 * 32 - padding == records[2]["tokens"] - records[1]["tokens"]


def test_mistakes_in_the_mixture_leave_nothing_behind(packed, tmp_path):
    _, errors = pretrain(packed, tmp_path / "run", "--shard-weights", "1", check=1)
    assert "shard_weights has 1 numbers for 2 shards folders" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_run_that_a_gpu_began_goes_on_without_one_when_told_so(packed, tmp_path):
    run = tmp_path / "run"
    pretrain(packed, run, "--train.steps", "5", "--train.checkpoint-every-s", "0")
    (run / "DONE").unlink()
    shutil.rmtree(run / "model")
    config = json.loads((run / "config.json").read_text())
    config["train"] |= {"device": "cuda", "compile": True}
    (run / "config.json").write_text(json.dumps(config))
    _, errors = pretrain(packed, run, "--resume", check=1)
    assert "device=cuda is not there" in errors and "--device cpu" in errors
    output, _ = pretrain(packed, run, "--resume", "--device", "cpu", "--json")
    assert last_json(output)["steps"] == 5
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
