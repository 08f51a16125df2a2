"""Runs that are killed or asked to stop, through the real command line. `make kill-test` does the first at length."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e.command import plinth

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


@pytest.mark.slow
def test_a_run_killed_also_inside_a_checkpoint_ends_with_the_same_weights():
    """The script exits with 0 only when weights, optimizer state and metrics equal those of an uninterrupted run."""
    command = [sys.executable, SCRIPT, "--trials", "1", "--kills", "2", "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["identical"] == result["trials"] == 1 and result["kills"] >= 1


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_s_signal_saves_and_gives_the_code_that_asks_to_be_called_again(built, tmp_path, name):
    out, run = built[0], tmp_path / "run"
    command = ("pretrain", out / "shards", "--tokenizer", out / "tokenizer", "--out", run)
    small = ("--model.hidden-size", "32", "--model.num-layers", "1", "--model.num-heads", "1", "--model.num-kv-heads", "1",
             "--model.head-dim", "32", "--model.intermediate-size", "64", "--seq-len", "32", "--sequences-per-step", "2",
             "--micro-batch-size", "1", "--train.steps", "3000", "--matmul-flops-per-s", "1e11")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "plinth", *map(str, command), *small], stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    os.kill(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "saved. Continue with --resume." in errors and "Traceback" not in errors, errors
    step = int((run / "checkpoints").glob("step_*").__next__().name.removeprefix("step_"))
    assert len(metrics.read_text().splitlines()) == step < 3000
    errors = plinth("pretrain", out / "shards", "--tokenizer", out / "tokenizer", "--out", run, *small, check=1)[1]
    assert f"already holds a run (step {step})" in errors
