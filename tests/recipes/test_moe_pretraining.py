"""Pretraining a decoder with experts: metrics of the load, a resumed run equal to one that never stopped, better than frequencies alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from plinth.cli.pretrain import main
from plinth.data.shards import open_split
from plinth.evaluation.likelihood import score_corpus
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model
from plinth.recipes import pretraining
from plinth.recipes.pretraining import PretrainConfig, pretrain
from plinth.tokenizer.encode import Tokenizer
from plinth.training.loop import TrainConfig

MODEL = DecoderConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64, max_seq_len=64,
    num_experts=4, num_active_experts=2, expert_intermediate_size=32,
)  # fmt: skip
TRAIN = TrainConfig(steps=8, warmup_steps=2, dtype="float32", num_threads=2, checkpoint_every_s=0.0)
CONFIG = PretrainConfig(model=MODEL, seq_len=64, sequences_per_step=8, micro_batch_size=4, train=TRAIN)


class Killed(BaseException):
    """Stands for a power cut."""


def run(shards, out, config=CONFIG, **options):
    return pretrain(out, shards, shards.parent / "tokenizer", config, **options)


def metrics(done):
    return [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]


def test_stopped_and_resumed_equals_never_stopped(shards, tmp_path, monkeypatch):
    whole = run(shards, tmp_path / "whole")
    rows_of = pretraining.BatchSchedule.rows

    def rows(schedule, now):
        if now == 5:
            raise Killed
        return rows_of(schedule, now)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(pretraining.BatchSchedule, "rows", rows)
        run(shards, tmp_path / "cut")
    resumed = run(shards, tmp_path / "cut", resume=True)
    wanted, found = load_model(whole.model_dir).state_dict(), load_model(resumed.model_dir).state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    for name in ("loss_nats", "text_loss_nats", "load_entropy", "router_balance"):
        assert [line[name] for line in metrics(whole)] == [line[name] for line in metrics(resumed)]


def test_held_out_text_is_predicted_better_than_by_frequencies_and_the_load_stays_even(shards, tmp_path):
    done = run(shards, tmp_path / "run", replace(CONFIG, train=replace(TRAIN, steps=40)))
    last, tokenizer = metrics(done)[-1], Tokenizer.load(shards.parent / "tokenizer")
    assert last["load_entropy"] > 0.95 and 1.0 <= last["router_balance"] < 1.2 and last["max_load"] < 2.0
    assert last["text_loss_nats"] < last["loss_nats"]
    model = load_model(done.model_dir)
    assert model.config == MODEL
    counts = np.bincount(open_split(shards, "train").tokens, minlength=300) + 1.0
    frequencies = torch.from_numpy(-np.log(counts / counts.sum()))
    heldout = open_split(shards, "heldout").tokens.astype(np.int64)
    trivial = float(frequencies[torch.from_numpy(heldout)].mean())
    assert score_corpus(model, shards, tokenizer=tokenizer)["loss_nats"].value < 0.7 * trivial
    assert len(Engine(model).generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0))[0].tokens) == 5


def test_the_command_takes_experts(shards, tmp_path, capsys):
    shape = {"num-experts": 8, "expert-intermediate-size": 16, "hidden-size": 32, "num-layers": 1, "num-heads": 1, "num-kv-heads": 1,
             "head-dim": 16, "max-seq-len": 32}  # fmt: skip
    words = [word for name, value in shape.items() for word in (f"--model.{name}", str(value))]
    out = tmp_path / "run"
    arguments = [str(shards), "--tokenizer", str(shards.parent / "tokenizer"), "--out", str(out), "--seq-len", "32", "--train.steps", "2"]
    assert main([*arguments, "--sequences-per-step", "4", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    assert load_model(out / "model").config.num_experts == 8
