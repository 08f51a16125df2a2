"""`plinth serve` as a process: it says where the page is, answers, and stops on Ctrl-C."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.tokenizer.train import train_tokenizer

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    tokenizer = train_tokenizer(["def main(argv):\n    return 0\n"] * 10, vocab_size=280)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, intermediate_size=32,
        max_seq_len=64,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("runs") / "mine"
    path.mkdir()
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, path / "model")
    return path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def command(*arguments) -> list[str]:
    return [sys.executable, "-c", "from plinth.cli.main import entry; entry()", "serve", *map(str, arguments)]


@contextlib.contextmanager
def serving(*arguments):
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_serves_until_ctrl_c(run_dir):
    with serving(run_dir, "--port", 0, "--json") as process:
        facts = json.loads(process.stdout.readline())
        assert facts["model"] == "mine" and facts["max_seq_len"] == 64
        assert "chat" in httpx.get(facts["url"]).text
        body = {"model": "mine", "prompt": "def", "max_tokens": 3}
        assert httpx.post(f"{facts['api']}/completions", json=body, timeout=60).status_code == 200
        assert httpx.get(facts["url"], headers={"Host": "rebound.example"}).status_code == 403
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "stopped." in errors and "Traceback" not in errors


def test_keys_json_log_and_sigterm(run_dir, tmp_path):
    (tmp_path / "keys").write_text("sesame\n")
    with serving(run_dir, "--port", 0, "--json", "--api-key-file", tmp_path / "keys", "--log-json", "--max-queue", 3) as process:
        facts = json.loads(process.stdout.readline())
        body = {"model": "mine", "prompt": "private words", "max_tokens": 3}
        assert httpx.post(f"{facts['api']}/completions", json=body).status_code == 401
        headers = {"Authorization": "Bearer sesame"}
        assert httpx.post(f"{facts['api']}/completions", json=body, headers=headers, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["event"] == "request"] == [401, 200]
    assert "private" not in errors and "sesame" not in errors and "Traceback" not in errors


def test_prints_the_page_for_people(run_dir):
    with serving(run_dir, "--port", 0, "--name", "other") as process:
        first, second = process.stdout.readline(), process.stdout.readline()
        url = first.split()[-1]
        assert first.startswith("chat page") and httpx.get(f"{url}v1/models").json()["data"][0]["id"] == "other"
        assert "model other" in second


def test_a_pretraining_run_opens_as_continuation(run_dir, tmp_path):
    (tmp_path / "model").symlink_to(run_dir / "model")
    (tmp_path / "provenance.json").write_text('{"stage": "pretrain"}')
    with serving(tmp_path, "--port", 0, "--json") as process:
        assert json.loads(process.stdout.readline())["chat"] is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "TAKEN"], "is taken. Pass --port"),
        (["--port", "70000"], "0 to 65535"),
        (["--host", "192.0.2.1"], "not an address of this machine"),
        (["--max-batch", "0"], "max_batch=0"),
        (["--max-queue", "0"], "max_queue=0"),
        (["--api-key-file", "/dev/null"], "holds no key"),
    ],
)
def test_bad_options_are_one_line(run_dir, arguments, says):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        arguments = [port if argument == "TAKEN" else argument for argument in arguments]
        done = subprocess.run(command(run_dir, *arguments), capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_no_model_is_one_line(tmp_path):
    done = subprocess.run(command(tmp_path / "absent"), capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 1 and "does not exist" in done.stderr and "Traceback" not in done.stderr
