"""Run directories written by hand, line by line, as a run would write them."""

import json

import pytest

from local_server import serve
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


@pytest.fixture(scope="session")
def start():
    """Serve the page of a path: `with start(path) as url`."""
    return lambda path: serve(create_app(path, frozenset({"127.0.0.1", "localhost"})))
