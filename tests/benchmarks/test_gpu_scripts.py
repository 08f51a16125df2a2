"""The benchmarks for GPUs run as scripts, on the CPU at tiny size, and their records say what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_script(name, records, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--device", "cpu", "--records", str(records), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((records / f"{name}.json").read_text())


def test_throughput_relates_every_side_to_the_first_and_to_the_matrix_rate(tmp_path):
    arguments = ("--sizes", "tiny", "--rounds", "2", "--steps", "2", "--profile", str(tmp_path / "profile"))
    record = run_script("gpu_throughput", tmp_path, *arguments)
    ours, plain = record["rows"]
    assert ours["first_over_this"] == {"median": 1.0, "min": 1.0, "max": 1.0, "n": 2}
    assert plain["first_over_this"]["n"] == plain["tokens_per_s"]["n"] == 2
    for row in record["rows"]:
        rate = row["tokens_per_s"]["median"] * row["flops_per_token"]
        assert row["mfu"] == pytest.approx(rate / record["matmul_flops_per_s"]) and row["mfu_datasheet"] is None
        assert 0 < row["mfu"] < 1 and row["micro_batch_size"] in (2, 4)
    assert record["hardware"]["cpu"] and record["versions"]["torch"]
    assert "aten::mm" in next((tmp_path / "profile").iterdir()).read_text()


def test_time_to_loss_ends_at_the_first_share_that_reaches_the_plain_sides_loss(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i, path in enumerate(sorted((ROOT / "src" / "plinth").rglob("*.py"))[:40]):
        (text / f"{i}.py").write_text(path.read_text())
    arguments = ("--size", "tiny", "--steps", "12", "--seeds", "2", "--plain-lrs", "1e-4", "1e-3", "--text", str(text))
    record = run_script("gpu_time_to_loss", tmp_path, *arguments, "--shares", "0.1", "0.5", "2.0")
    plain, ours = record["rows"]
    assert record["loss_nats_to_reach"] == plain["loss_nats"]["median"]
    assert min(plain["tried"], key=lambda run: run["loss_nats"])["lr"] == plain["lr"] and len(plain["tried"]) == 2
    assert record["reached"] == (ours["loss_nats"]["median"] <= record["loss_nats_to_reach"])
    assert record["reached"] and record["ratio_plain_over_ours"]["n"] == 2  # Muon on a tiny model, with up to twice the steps
    steps = [run["steps"] for run in (*ours["tried"], *ours["runs"])]
    assert steps == sorted(steps) and len({run["seed"] for run in ours["runs"]}) == 2
    assert 1.0 < record["bytes_a_token"] < 6.0
