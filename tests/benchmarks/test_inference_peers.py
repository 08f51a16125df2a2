"""The benchmark of inference: what it makes of its rounds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import inference_peers  # noqa: E402


def line(side: str, rate: float, variant: dict | None = None, **more) -> dict:
    return {"size": "25M", "workload": "decode-1", "threads": 2, "side": side, "variant": variant or {}, "tokens_per_s": rate, **more}


def test_the_best_setting_of_a_peer_counts_and_ratios_are_of_neighbours():
    rounds = []
    for ours, slow, fast in ((100.0, 10.0, 50.0), (300.0, 11.0, 100.0), (120.0, 90.0, 40.0)):
        rounds += [line("plinth-bf16", ours), line("llama-bf16", slow, {"flash": False}), line("llama-bf16", fast, {"flash": True})]
    (row,) = inference_peers.summarise(rounds)
    assert row["sides"]["llama-bf16"]["settings"] == {"flash": True}
    assert row["sides"]["llama-bf16"]["tokens_per_s"] == {"median": 50.0, "min": 40.0, "max": 100.0, "n": 3}
    assert row["ours_over"] == {"llama-bf16": {"median": 3.0, "min": 2.0, "max": 3.0, "n": 3}}


def test_equal_texts_are_counted():
    rounds = [line("plinth-bf16", 1.0, ids=[1, 2]), line("transformers-bf16", 1.0, ids=[1, 2])]
    rounds += [line("plinth-bf16", 1.0, ids=[1, 2]), line("transformers-bf16", 1.0, ids=[1, 3])]
    assert inference_peers.summarise(rounds)[0]["identical"] == 0.5


def test_tasks_with_too_few_rounds_are_missing(tmp_path):
    journal = tmp_path / "rounds.jsonl"
    answer = {"tokens": 8, "seconds": 2.0}
    for number in (1, 2):
        inference_peers.note(journal, "25M", "decode-1", 2, "plinth-bf16", {}, number, answer)
    assert inference_peers.read(journal)[0]["tokens_per_s"] == 4.0
    assert "25M:decode-1:2" not in inference_peers.missing(journal, ["25M"], 2)
    assert "25M:decode-1:2" in inference_peers.missing(journal, ["25M"], 3)
    assert "25M:decode-1:1" in inference_peers.missing(journal, ["25M"], 2)


@pytest.mark.parametrize("name", inference_peers.WORKLOADS)
def test_every_side_has_a_process(name):
    sides = inference_peers.WORKLOADS[name].sides
    assert inference_peers.program_of(sides[0]) == sides[0]
    assert {inference_peers.program_of(side).split("-")[0] for side in sides} <= {"plinth", "llama", "transformers"}
