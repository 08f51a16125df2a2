"""Run directories written by hand, line by line, as a run would write them."""

import contextlib
import json
import socket
import threading

import httpx
import pytest
import uvicorn

from plinth.watch.app import create_app
from scaling.conftest import corpus, probe  # noqa: F401  (fixtures)


class Written:
    """A run directory that a test writes like a run: `step` appends a line."""

    def __init__(self, path, steps=100, stage="pretrain"):
        path.mkdir(parents=True)
        self.path = path
        (path / "config.json").write_text(json.dumps({"train": {"steps": steps}}))
        (path / "provenance.json").write_text(json.dumps({"stage": stage, "created": "2026-01-01T00:00:00Z"}))

    def step(self, number, **fields):
        record = {
            "step": number, "time_s": 0.5 * number, "loss_nats": 3.0 + 10.0 / number, "lr": 0.004, "grad_norm": 1.0, "tokens_per_s": 1000.0,
            "mfu": 0.4, "tokens": 500 * number, "energy_kwh": 1e-5 * number,
        } | fields  # fmt: skip
        self.append(json.dumps(record) + "\n")

    def append(self, text):
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(text)


@pytest.fixture
def written(tmp_path):
    return lambda name="run", **options: Written(tmp_path / name, **options)


@contextlib.contextmanager
def serve(path):
    """Serve the page of a path on a free port of this machine; yield its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    app = create_app(path, frozenset({"127.0.0.1", "localhost"}))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        httpx.get(f"{url}/healthz", timeout=60).raise_for_status()
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture(scope="session")
def start():
    return serve
