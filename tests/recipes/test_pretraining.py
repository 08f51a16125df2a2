"""Pretraining in stages: the rows follow the schedule, and a run stopped in one stage and resumed in the next is the same run."""

import json

import pytest
import torch

from plinth.config import UserError
from plinth.data.curate import curate
from plinth.data.shards import pack_corpus
from plinth.data.sources import read_documents
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model
from plinth.recipes import pretraining
from plinth.recipes.pretraining import PretrainConfig, pretrain
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig

MODEL = DecoderConfig(
    vocab_size=300, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, intermediate_size=32, max_seq_len=32
)
CONFIG = PretrainConfig(
    model=MODEL, seq_len=32, sequences_per_step=4, micro_batch_size=2, stages=((0.5, 8, 8), (0.5, 32, 4)),
    train=TrainConfig(steps=6, warmup_steps=2, dtype="float32", num_threads=2, checkpoint_every_s=0.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a folder with shards and their tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    lines = [" ".join(f"{word}{(i * j) % 17}" for j, word in enumerate(["stone", "river", "cloud", "field"] * 8)) for i in range(1, 40)]
    for i in range(0, 36, 3):
        (folder / f"{i}.txt").write_text("\n".join(lines[i : i + 3]))
    curate(read_documents([folder]), folder / "corpus")
    tokenizer = train_tokenizer(lines, 300)
    tokenizer.save(folder / "tokenizer")
    pack_corpus(folder / "corpus", tokenizer, folder / "shards")
    return folder


def run(folder, out, **options):
    return pretrain(out, folder / "shards", folder / "tokenizer", CONFIG, **options)


def test_the_rows_of_a_step_follow_its_stage(text, tmp_path):
    tokens = [json.loads(line)["tokens"] for line in (run(text, tmp_path / "run").path / "metrics.jsonl").read_text().splitlines()]
    steps = [b - a for a, b in zip([0, *tokens], tokens)]
    assert steps == [64] * 4 + [128] * 2  # half of the tokens each, as near as whole steps go


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("step", [2, 5])
def test_stopped_in_one_stage_and_resumed_equals_never_stopped(text, tmp_path, monkeypatch, step):
    whole = load_model(run(text, tmp_path / "whole").model_dir).state_dict()
    rows_of = pretraining.BatchSchedule.rows

    def rows(schedule, now):
        if now == step:
            raise Killed
        return rows_of(schedule, now)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(pretraining.BatchSchedule, "rows", rows)
        run(text, tmp_path / "cut")
    resumed = load_model(run(text, tmp_path / "cut", resume=True).model_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stage_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="seq_len=64 exceeds seq_len=32"):
        PretrainConfig(model=MODEL, seq_len=32, stages=((1.0, 64, 1),))
