"""Finetuning of language models: other text is learnt, another vocabulary is taken over, resumed equals never stopped."""

import json
from dataclasses import replace

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.shards import pack_corpus
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.transformer import Transformer
from plinth.posttraining.depth_rates import RateConfig
from plinth.posttraining.vocabulary import shared_rows, with_vocabulary
from plinth.recipes import language_model_finetuning
from plinth.recipes.language_model_finetuning import LmFinetuneConfig, finetune_language_model, language_model_groups
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

LSTM = AwdLstmConfig(vocab_size=300, embedding_size=12, hidden_size=16, num_layers=2)
DECODER = DecoderConfig(vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=32, max_seq_len=32)
MODELS = {"awd-lstm": lambda: AwdLstm(LSTM), "decoder": lambda: Transformer(DECODER)}
CONFIG = LmFinetuneConfig(
    seq_len=16, sequences_per_step=6, micro_batch_size=3, heldout_tokens=2000,
    train=TrainConfig(
        steps=6, dtype="float32", num_threads=2, checkpoint_every_s=0.0, background_saves=False,
        optimizer=OptimizerConfig(name="adamw", lr=0.01),
    ),
)  # fmt: skip


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.fixture(scope="module")
def bases(shards, tmp_path_factory):
    """A fresh model of each kind with the tokenizer of the shards."""
    folder = tmp_path_factory.mktemp("bases")
    for name, build in MODELS.items():
        save_model(build().init_weights(torch.Generator().manual_seed(0)), Tokenizer.load(shards.parent / "tokenizer"), folder / name)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_stopped_and_resumed_equals_never_stopped(bases, shards, tmp_path, monkeypatch, kind):
    whole = finetune_language_model(tmp_path / "whole", bases / kind, [shards], CONFIG)
    seen, make = [], language_model_finetuning._job

    def until(*args):
        job = make(*args)

        def batches_at(step):
            seen.append(step)
            if step == 4:
                raise Killed
            return job.batches_at(step)

        return replace(job, batches_at=batches_at)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(language_model_finetuning, "_job", until)
        finetune_language_model(tmp_path / "cut", bases / kind, [shards], CONFIG)
    resumed = finetune_language_model(tmp_path / "cut", bases / kind, [shards], CONFIG, resume=True)
    states = [load_model(run.model_dir).state_dict() for run in (whole, resumed)]
    assert seen[-1] == 4 and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert load_model(whole.model_dir).config == load_model(bases / kind).config


@pytest.mark.parametrize("kind", MODELS)
def test_the_command_learns_the_text(bases, shards, tmp_path, capsys, kind):
    words = ["transfer", "finetune-lm", bases / kind, shards, "--out", tmp_path / "run", "--epochs", "2", "--train.dtype", "float32"]
    words += ["--seq-len", "32", "--sequences-per-step", "16", "--micro-batch-size", "16", "--train.optimizer.lr", "0.02", "--json"]
    words += ["--heldout-tokens", "3000", "--rates.depth-factor", "1.5"]
    assert main([str(word) for word in words]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["heldout_loss_nats"] < 0.75 * summary["heldout_loss_nats_before"]
    assert summary["epochs"] == pytest.approx(2, abs=0.1) and summary["known_share"] == 1.0
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates[0] == pytest.approx(0.02 / 32) and max(rates) == 0.02 and rates.index(0.02) == int(0.1 * len(rates))


def test_a_tied_embedding_learns_at_the_heads_rate():
    for model in (AwdLstm(LSTM), Transformer(DECODER)):
        groups = language_model_groups(model)
        assert "embed.weight" in groups[-1] and groups[0][0].startswith("layers.0")
        assert sorted(name for group in groups for name in group) == sorted(name for name, _ in model.named_parameters())
    untied = language_model_groups(Transformer(replace(DECODER, tie_embeddings=False)))
    assert untied[0] == ["embed.weight"] and "head.weight" in untied[-1]


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_that_both_vocabularies_have_keep_their_weights(bases, shards, kind):
    old = Tokenizer.load(shards.parent / "tokenizer")
    new = train_tokenizer(["zebras graze by the quarry, and quokkas quietly queue for quinces in the town"] * 3, 290)
    model = load_model(bases / kind)
    changed, rows = with_vocabulary(model, old, new), shared_rows(old, new)
    assert changed.config.vocab_size == new.vocab_size == len(rows) and 262 <= int((rows >= 0).sum()) < len(rows)
    for i, row in enumerate(rows.tolist()):
        assert row < 0 or old.token_bytes(row, skip_special=False) == new.token_bytes(i, skip_special=False)
    known = rows >= 0
    assert torch.equal(changed.embed.weight[known], model.embed.weight[rows[known]])
    torch.testing.assert_close(changed.embed.weight[~known][0], model.embed.weight.mean(0))
    inner = "layers.0.weight_hh" if kind == "awd-lstm" else "layers.0.attention.qkv.weight"
    assert torch.equal(changed.get_parameter(inner), model.get_parameter(inner))
    text = old.encode("aeb d")  # bytes alone: spelled alike in both
    ids = torch.tensor([[rows.tolist().index(i) for i in text]])
    torch.testing.assert_close(changed(ids), model(torch.tensor([text])))


def test_another_tokenizer_is_taken_over_and_published(bases, shards, tmp_path):
    tokenizer = train_tokenizer(["On day 3 the red cat walked from the barn to the wood and met 9 friends."] * 9, 280)
    tokenizer.save(tmp_path / "tokenizer")
    pack_corpus(shards.parent / "corpus", tokenizer, tmp_path / "shards")
    told = []
    with pytest.raises(UserError, match="differs from"):
        finetune_language_model(tmp_path / "none", bases / "awd-lstm", [tmp_path / "shards"], CONFIG)
    run = finetune_language_model(
        tmp_path / "run", bases / "awd-lstm", [tmp_path / "shards"], CONFIG, tokenizer_dir=tmp_path / "tokenizer", warn=told.append
    )
    assert load_model(run.model_dir).config.vocab_size == tokenizer.vocab_size and 0.5 < run.summary["known_share"] < 1.0
    assert Tokenizer.load(run.model_dir).sha256 == tokenizer.sha256 and "begin at the mean embedding" in told[0]


def test_mistakes_are_named(bases):
    with pytest.raises(UserError, match="cut_fraction=1.5 must lie between 0 and 1"):
        RateConfig(cut_fraction=1.5)
    with pytest.raises(UserError, match="dropout=-1.0 must be 0 or more"):
        LmFinetuneConfig(dropout=-1.0)
