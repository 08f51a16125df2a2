"""Pretraining under a parametrisation, from the command line to a model folder."""

import json

import pytest
import torch

from plinth.cli.pretrain import main
from plinth.config import UserError
from plinth.models.hub import load_model

SHAPE = ("--model.hidden-size", "64", "--model.num-layers", "4", "--model.num-heads", "4", "--model.num-kv-heads", "4",
         "--model.head-dim", "16", "--model.intermediate-size", "96", "--seq-len", "32", "--sequences-per-step", "4",
         "--train.steps", "3", "--train.dtype", "float32", "--train.num-threads", "1", "--matmul-flops-per-s", "1e11")  # fmt: skip


def run(shards, out, *arguments):
    main([str(shards), "--tokenizer", str(shards.parent / "tokenizer"), "--out", str(out), *SHAPE, *arguments])
    losses = [json.loads(line)["loss_nats"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_model(out / "model"), losses


def test_completep_from_the_command_line(shards, tmp_path):
    standard, losses = run(shards, tmp_path / "standard")
    base, same = run(shards, tmp_path / "base", "--parametrization", "completep", "--base-width", "64", "--base-depth", "4")
    assert same == losses
    assert all(torch.equal(a, b) for a, b in zip(standard.parameters(), base.parameters()))
    wide, other = run(shards, tmp_path / "wide", "--parametrization", "completep", "--base-width", "32", "--base-depth", "2")
    assert wide.config.output_multiplier == 0.5
    assert other[1:] != losses[1:]  # the embedding is the head, and has moved
    published = json.loads((tmp_path / "wide" / "model" / "config.json").read_text())
    assert published["rms_norm_eps"] == pytest.approx(1e-6 / 4) and published["model_type"] == "qwen3"


def test_a_plan_and_a_parametrization_exclude_each_other(shards, tmp_path):
    with pytest.raises(UserError, match="--plan has rates for its own shape.*Leave one of them out"):
        run(shards, tmp_path / "run", "--plan", "plan.json", "--parametrization", "mup", "--base-width", "32")
