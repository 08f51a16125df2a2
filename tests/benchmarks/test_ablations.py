"""The league's arithmetic: equal time, paired differences, and arms that the model and the optimizer accept."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from ablations.arms import ARMS, BASELINE, SIZES, SWEEPS, Arm, Size
from ablations.league import run_arm, steps_within, time_arm, timing_key
from ablations.report import paired, summarise, table

from plinth.models.config import DecoderConfig
from plinth.models.cost import count_params
from plinth.training.optim import OptimizerConfig


def test_a_step_that_costs_twice_gets_half_the_updates():
    assert steps_within("1M", Arm(), [1.0]) == SIZES["1M"].steps
    assert steps_within("1M", Arm(), [2.0]) == SIZES["1M"].steps // 2
    # two stages of equal updates, one at half the cost: mean 0.75
    arm = Arm(stages=((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)))
    assert steps_within("1M", arm, [1.0, 0.5]) == int(SIZES["1M"].steps / 0.75)


def test_the_paired_interval_is_students():
    found = paired([1.0, 2.0, 3.0], [0.0, 2.0, 1.0])  # differences 1, 0, 2: mean 1, deviation 1
    assert found["mean"] == pytest.approx(1.0) and found["n"] == 3
    half = 4.302653 / 3**0.5  # t of 2 degrees of freedom
    assert found["ci95"] == pytest.approx([1 - half, 1 + half], rel=1e-6)
    assert found["p"] == pytest.approx(0.2254, abs=1e-4)


def test_arms_pair_with_the_default_by_seed_and_stay_listed():
    row = {"size": "1M", "steps": 10, "tokens": 100, "change": {}}
    rows = [row | {"arm": BASELINE, "seed": s, "heldout_nats": 4.0 + s} for s in (0, 1)]
    rows += [row | {"arm": "adamw", "seed": s, "heldout_nats": 4.5 + s} for s in (1, 0, 2)]
    summary = summarise(rows, "1M")
    assert [entry["arm"] for entry in summary] == [BASELINE, "adamw"]
    assert summary[1]["minus_default"]["n"] == 2 and summary[1]["minus_default"]["mean"] == pytest.approx(0.5)
    assert "+0.500" in table(summary, sweep=False)


@pytest.mark.parametrize("size", SIZES)
def test_every_arm_is_a_change_that_the_project_knows(size):
    model, optimizer = ({field.name for field in fields(cls)} for cls in (DecoderConfig, OptimizerConfig))
    for arm in (ARMS | SWEEPS[size]).values():
        assert set(arm.model) <= model and set(arm.optimizer) <= optimizer
    body = count_params(DecoderConfig(**SIZES[size].model))["matrix"]
    without_gate = DecoderConfig(**(SIZES[size].model | ARMS["relu²"].model_fields(size)))
    assert count_params(without_gate)["matrix"] == body  # the comparison is one of equal parameters
    assert body == pytest.approx({"1M": 1e6, "10M": 1e7}[size], rel=0.1)


def test_an_arm_is_timed_trained_and_scored(tmp_path, monkeypatch):
    from plinth.data.curate import CurateConfig, curate
    from plinth.data.shards import pack_corpus
    from plinth.data.sources import read_documents
    from plinth.tokenizer.train import train_tokenizer

    words = [f"{word}{i * j % 17}" for i in range(1, 60) for j, word in enumerate(["stone", "river", "cloud", "field"] * 4)]
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(" ".join(words[60 * i :][:200]) + ".\n")
    curate(read_documents([tmp_path]), tmp_path / "corpus", CurateConfig(heldout_fraction=0.3))
    pack_corpus(tmp_path / "corpus", train_tokenizer([" ".join(words)], 288), tmp_path / "shards")
    model = dict(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=32)
    rates = {"muon": dict(lr=0.02, muon_lr=0.02)}
    monkeypatch.setitem(SIZES, "tiny", Size(model=model, sequences=2, steps=30, rates=rates, vocab_size=288, seq_len=16))
    monkeypatch.setitem(SWEEPS, "tiny", {})
    times = {timing_key("tiny", ARMS[BASELINE]): time_arm(tmp_path / "shards", "tiny", ARMS[BASELINE])}
    row, again = (run_arm(tmp_path / "shards", "tiny", BASELINE, 0, times) for _ in range(2))
    assert row == again and (row["steps"], row["tokens"]) == (30, 30 * 32)
    assert row["heldout_nats"] < 5.2  # uniform over the vocabulary: 5.66
