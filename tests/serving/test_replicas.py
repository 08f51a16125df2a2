"""Several servers behind one address: with Ray, the answers of one; without it, one clear line."""

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plinth.cli.main import main
from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.serving.listening import listen
from plinth.tokenizer.train import train_tokenizer

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("replicas") / "tiny"
    tokenizer = train_tokenizer(["the cat sat on the mat. " * 20], 280)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64
    )
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, path)
    return path


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_one_line_says_what_to_install(folder, capsys):
    assert main(["serve", str(folder), "--port", str(free_port()), "--ray-replicas", "2"]) == 1
    assert "ray_replicas=2 needs Ray Serve" in (text := capsys.readouterr().err) and "plinth-fm[cluster]" in text


def test_numbers_that_mean_nothing_are_refused(folder, capsys):
    assert main(["serve", str(folder), "--port", str(free_port()), "--ray-replicas", "0"]) == 1
    assert "ray_replicas=0 must be at least 1" in capsys.readouterr().err
    assert main(["serve", str(folder), "--port", "0", "--ray-replicas", "2"]) == 1
    assert "port=0 has no meaning with ray_replicas" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="Ray (the extra `cluster`) is not installed")
def test_two_replicas_answer_as_one(folder):
    port = free_port()
    command = [sys.executable, "-m", "plinth", "serve", str(folder), "--port", str(port), "--ray-replicas", "2", "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert json.loads(next(line for line in process.stdout if line.startswith("{")))["replicas"] == 2
        body = json.dumps({"model": "tiny", "prompt": "the cat", "max_tokens": 8, "temperature": 0})
        answers = {ask(port, body) for _ in range(8)}
        assert len(answers) == 1
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0


def ask(port: int, body: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    return json.loads(answer.read())["choices"][0]["text"]


def free_port() -> int:
    with listen("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]
