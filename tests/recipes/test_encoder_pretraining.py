"""Pretraining of encoders: rows and masks follow from seed and step, a resumed run is the same run, and what is learnt is published."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.masking import MaskingConfig
from plinth.data.rows import IGNORE
from plinth.data.shards import open_split
from plinth.models.encoder_config import EncoderConfig
from plinth.models.hub import load_model
from plinth.recipes import encoder_rows
from plinth.recipes.encoder_pretraining import BertConfig, ElectraConfig, open_rows, pretrain_encoder
from plinth.recipes.encoder_rows import RowConfig
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import encoder_tokens, with_encoder_tokens
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

MODEL = EncoderConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_seq_len=32)
TRAIN = TrainConfig(steps=4, warmup_steps=1, dtype="float32", num_threads=2, checkpoint_every_s=0.0, optimizer=OptimizerConfig(name="muon"))
BERT = BertConfig(model=MODEL, data=RowConfig("stream", 32, 8, 4), train=TRAIN)
ELECTRA = ElectraConfig(model=MODEL, data=RowConfig("document", 32, 8, 4), train=TRAIN, generator_share=0.5)


def tokenizer_of(shards):
    return with_encoder_tokens(Tokenizer.load(shards.parent / "tokenizer"))


def run(shards, out, config, **options):
    return pretrain_encoder(out, [shards], shards.parent / "tokenizer", config, **options)


@pytest.mark.parametrize("kind", ["stream", "document"])
def test_rows_are_marked_texts_and_masks_follow_from_seed_and_step(shards, kind):
    tokenizer, config = tokenizer_of(shards), dataclasses.replace(BERT, data=RowConfig(kind, 32, 8, 4))
    tokens, rows = encoder_tokens(tokenizer), open_rows(config, [shards], tokenizer, "train")
    first, again, other = rows.batches(0, True), rows.batches(0, True), rows.batches(1)
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
    assert len(first) == 2 and any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first[0], other[0]))
    for inputs, targets, mask, uniform in first:
        assert inputs.shape == targets.shape == mask.shape == uniform.shape and inputs.shape[1] <= 32
        widths = mask.sum(1)
        assert (inputs[:, 0] == tokens.cls).all() and (inputs.gather(1, widths[:, None] - 1) == tokens.sep).all()
        assert (inputs[~mask] == tokens.pad).all() and (targets[~mask] == IGNORE).all()
        whole = torch.where(targets >= 0, targets, inputs)
        assert not set(targets[targets >= 0].tolist()) & set(tokenizer.special_ids)
        ordinary = (~torch.isin(whole, torch.tensor(sorted(tokenizer.special_ids)))).sum(1)
        assert torch.equal((targets >= 0).sum(1), (0.15 * ordinary.double()).round().long().clamp_min(1))


def test_rows_of_documents_hold_each_token_once_an_epoch(shards):
    """Long documents are cut, none is left out, and <|endoftext|> is no part of a row."""
    tokenizer, config = tokenizer_of(shards), dataclasses.replace(BERT, data=RowConfig("document", 32, 8, 4))
    rows, split = open_rows(config, [shards], tokenizer, "train"), open_split(shards)
    seen = [text for step in range(rows.steps_per_epoch) for part in rows._source.texts(step) for text in part]
    assert max(map(len, seen)) == 30
    expected = np.concatenate([split.document(i)[:-1] for i in range(split.num_documents)])
    assert (np.bincount(np.concatenate(seen)) == np.bincount(expected, minlength=np.concatenate(seen).max() + 1)).all()


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("config", [BERT, ELECTRA], ids=["bert", "electra"])
def test_stopped_and_resumed_equals_never_stopped(shards, tmp_path, monkeypatch, config):
    whole = load_model(run(shards, tmp_path / "whole", config).model_dir).state_dict()
    batches = encoder_rows.EncoderRows.batches

    def until(rows, step, guesses=False):
        if step == 2:
            raise Killed
        return batches(rows, step, guesses)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(encoder_rows.EncoderRows, "batches", until)
        run(shards, tmp_path / "cut", config)
    resumed = load_model(run(shards, tmp_path / "cut", config, resume=True).model_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_electra_publishes_both_parts_with_one_set_of_embeddings(shards, tmp_path):
    finished = run(shards, tmp_path / "run", ELECTRA)
    both = load_model(finished.model_dir), load_model(finished.path / "generator")
    assert [model.config.head for model in both] == ["rtd", "mlm"]
    ours, other = (model.encoder.embed.state_dict() for model in both)
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert both[1].config.hidden_size == 8 and both[1].config.embedding_width == 16
    line = json.loads((finished.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss_nats"] == pytest.approx(line["mlm_nats"] + 50 * line["rtd_nats"], rel=1e-4)


def test_masked_tokens_are_learnt_better_than_by_their_frequency(shards, tmp_path):
    """A hidden word can be told from the words around it, on held-out stories too."""
    config = dataclasses.replace(
        BERT,
        model=dataclasses.replace(MODEL, hidden_size=64, num_layers=2, intermediate_size=128),
        data=RowConfig("stream", 32, 32, 16),
        train=dataclasses.replace(TRAIN, steps=80, warmup_steps=5, checkpoint_every_s=60.0),
    )
    summary = run(shards, tmp_path / "run", config).summary
    assert summary["heldout_tokens"] > 100
    assert summary["heldout_nats"] < summary["heldout_unigram_nats"] - 0.1


@pytest.mark.parametrize("config", [BERT, ELECTRA], ids=["bert", "electra"])
def test_a_batch_seen_again_and_again_is_learnt_by_heart(shards, tmp_path, monkeypatch, config):
    batches = encoder_rows.EncoderRows.batches
    monkeypatch.setattr(encoder_rows.EncoderRows, "batches", lambda rows, step, guesses=False: batches(rows, 0, guesses))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(MODEL, hidden_size=64, intermediate_size=128),
        data=RowConfig("stream", 32, 4, 4),
        train=dataclasses.replace(TRAIN, steps=150, warmup_steps=5, checkpoint_every_s=60.0, optimizer=OptimizerConfig(name="adamw")),
    )
    finished = run(shards, tmp_path / "run", config)
    last = json.loads((finished.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.get("mlm_nats", last["loss_nats"]) < 0.1
    assert last.get("rtd_nats", 0.0) < 0.1


def test_the_command_trains_each_family_and_says_what_comes_next(shards, tmp_path, capsys):
    small = ["--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-heads", "2", "--model.intermediate-size", "32"]
    small += ["--data.seq-len", "32", "--data.sequences-per-step", "4", "--train.steps", "2", "--tokenizer", f"{shards.parent}/tokenizer"]
    assert main(["pretrain", "--family", "bert", str(shards), "--out", str(tmp_path / "bert"), *small]) == 0
    assert "plinth fill" in " ".join(capsys.readouterr().out.split())
    assert main(["pretrain", "--family", "electra", str(shards), "--out", str(tmp_path / "electra"), "--json", *small]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 2 and summary["num_params"] > 0


def test_mistakes_are_told_before_there_is_a_run(shards, tmp_path):
    with pytest.raises(UserError, match="seq_len=64 exceeds max_seq_len=32"):
        dataclasses.replace(BERT, data=RowConfig("stream", 64))
    with pytest.raises(UserError, match="vocab_size=20 is below"):
        run(shards, tmp_path / "run", dataclasses.replace(BERT, model=dataclasses.replace(MODEL, vocab_size=20)))
    with pytest.raises(UserError, match="model.head='tag' is decided by the family"):
        run(shards, tmp_path / "run", dataclasses.replace(BERT, model=MODEL.with_head("tag", ("a", "b"))))
    with pytest.raises(UserError, match="generator_share=0"):
        run(shards, tmp_path / "run", dataclasses.replace(ELECTRA, generator_share=0.0))
    with pytest.raises(UserError, match="share=1.5"):
        MaskingConfig(share=1.5)
    assert not (tmp_path / "run").exists()
