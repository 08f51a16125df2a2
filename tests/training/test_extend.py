"""Extending a run: as if it had been begun with more steps, bit for bit."""

import json

import pytest

from plinth.cli.main import main
from plinth.run import Run, file_sha256
from plinth.training.loop import TrainConfig

SMALL = (
    "--model.hidden-size", "32", "--model.num-layers", "1", "--model.num-heads", "1", "--model.num-kv-heads", "1",
    "--model.head-dim", "32", "--model.intermediate-size", "64", "--seq-len", "32", "--sequences-per-step", "4",
    "--micro-batch-size", "2", "--train.warmup-steps", "2", "--train.num-threads", "2", "--train.dtype", "float32",
    "--train.decay-fraction", "0.5", "--matmul-flops-per-s", "1e11",
)  # fmt: skip


def weights(run):
    return file_sha256(run / "model" / "model.safetensors")


def told(capsys, *arguments):
    """Run a command that must fail and return what it says."""
    assert main([str(a) for a in arguments]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with shards, a tokenizer, and a run of 8 steps whose learning rate falls after step 4."""
    root = tmp_path_factory.mktemp("base")
    (root / "texts").mkdir()
    for i in range(20):
        (root / "texts" / f"{i}.txt").write_text("\n".join(f"Line {j} of note {i} says {i * j} and {i + j}." for j in range(20)))
    for command in (
        ["data", "curate", root / "texts", "--out", root / "corpus"],
        ["tokenizer", "train", root / "corpus", "--vocab-size", "300", "--out", root / "tokenizer"],
        ["data", "pack", root / "corpus", "--tokenizer", root / "tokenizer", "--out", root / "shards"],
        pretrain(root, root / "run", 8),
    ):
        assert main([str(part) for part in command]) == 0
    return root


def pretrain(root, out, steps, *more):
    return ["pretrain", root / "shards", "--tokenizer", root / "tokenizer", "--out", out, *SMALL, "--train.steps", steps, *more]


def test_an_extended_run_equals_one_begun_with_more_steps(base, tmp_path):
    for steps in (12, 8):  # longer, and as long: the way back to the run's own weights
        assert main([str(part) for part in ("extend", base / "run", "--steps", steps, "--out", tmp_path / f"extended{steps}")]) == 0
        run = Run(tmp_path / f"extended{steps}")
        assert [record["step"] for record in run.metrics()] == list(range(1, steps + 1))
        assert run.summary["steps"] == steps
    assert main([str(part) for part in pretrain(base, tmp_path / "whole", 12)]) == 0
    assert weights(tmp_path / "extended12") == weights(tmp_path / "whole") != weights(base / "run")
    assert weights(tmp_path / "extended8") == weights(base / "run")
    parents = json.loads((tmp_path / "extended12" / "provenance.json").read_text())["parents"]
    assert [parent["stage"] for parent in parents] == ["shards", "tokenizer", "step_000004"]
    assert main([str(part) for part in ("extend", tmp_path / "extended12", "--steps", 14, "--out", tmp_path / "again")]) == 0
    assert Run(tmp_path / "again").summary["steps"] == 14


def test_a_horizon_that_ends_before_the_checkpoint_is_refused(base, tmp_path, capsys):
    text = told(capsys, "extend", base / "run", "--steps", 6, "--out", tmp_path / "short")
    assert "at or before step 3" in text and "checkpoints: 4" in text and "Ask for more steps" in text
    assert not (tmp_path / "short").exists()


def test_what_cannot_be_extended_says_why(base, tmp_path, capsys):
    assert "holds no run" in told(capsys, "extend", base / "shards", "--steps", 9, "--out", tmp_path / "x")
    assert "already holds a run" in told(capsys, "extend", base / "run", "--steps", 12, "--out", base / "run")
    assert "not there from here" in told(capsys, "extend", moved(base, tmp_path), "--steps", 12, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_run_in_stages_is_refused(base, tmp_path, capsys):
    copy = tmp_path / "staged"
    copy.mkdir()
    config = json.loads((base / "run" / "config.json").read_text())
    config["stages"] = [[0.5, 16, 8], [0.5, 32, 4]]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "provenance.json").write_bytes((base / "run" / "provenance.json").read_bytes())
    assert "was trained in stages" in told(capsys, "extend", copy, "--steps", 12, "--out", tmp_path / "x")


def moved(base, tmp_path):
    """A copy of the run whose shards have moved."""
    copy = Run(tmp_path / "moved")
    copy.path.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (copy.path / name).write_bytes((base / "run" / name).read_bytes())
    provenance = json.loads((base / "run" / "provenance.json").read_text())
    provenance["parents"][0]["path"] = str(tmp_path / "gone")
    (copy.path / "provenance.json").write_text(json.dumps(provenance))
    copy.checkpoints_dir.symlink_to(base / "run" / "checkpoints")
    return copy.path


def test_the_checkpoint_before_the_decay_is_the_last_with_the_full_rate():
    config = TrainConfig(steps=10, warmup_steps=2, decay_fraction=0.3)
    assert config.decay_start == 7 and config.lr_scale(6) == 1.0 > config.lr_scale(7)
    assert config.save_policy().keeps_for_good(7) and not config.save_policy().keeps_for_good(6)
