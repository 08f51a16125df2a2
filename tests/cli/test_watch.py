"""`plinth watch` as a user calls it, on a run that really trains."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.run import Run
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss

CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48, max_seq_len=16
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = TrainConfig(steps=30, dtype="float32", num_threads=1)
    run = Run.create(tmp_path_factory.mktemp("runs") / "small", "pretrain", {"train": {"steps": 30}})

    def batches_at(step):
        tokens = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(step))
        return [(tokens[:, :-1], tokens[:, 1:])]

    run.finish(
        train(run, Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0)), causal_lm_loss, batches_at, config, description="t")
    )
    return run


def watch(*arguments):
    command = [sys.executable, "-m", "plinth", "watch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "90"})


def test_once_draws_one_frame(run):
    done = watch(run.path, "--once")
    assert done.returncode == 0 and "step 30 of 30" in done.stdout and "Wh (" in done.stdout and re.search("[⠁-⣿]{3}", done.stdout)


def test_a_finished_run_ends_the_command(run):
    done = watch(run.path)
    assert done.returncode == 0 and "step 30 of 30" in done.stdout


def test_json_is_one_object(run):
    state = json.loads(watch(run.path, "--json").stdout)
    assert (state["status"], state["step"], state["tokens"]) == ("done", 30, 30 * 48)
    assert state["energy_kwh"] > 0 and state["energy_source"] and state["loss_nats"] < 4


def test_mistakes_are_one_line(run, tmp_path):
    nothing = watch(tmp_path / "nothing", "--once")
    assert nothing.returncode == 1 and "holds no run yet" in nothing.stderr and "Traceback" not in nothing.stderr
    assert "every_s=0.0 must be positive" in watch(run.path, "--every-s", "0").stderr


def test_serve_answers_until_ctrl_c(run):
    command = [sys.executable, "-m", "plinth", "watch", str(run.path), "--serve", "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = json.loads(process.stdout.readline())["url"]
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}state", timeout=60).json()["step"] == 30 and "<svg" not in httpx.get(url).text
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
