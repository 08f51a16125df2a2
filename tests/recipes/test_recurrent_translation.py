"""Recurrent translation through the command line: it learns, it resumes bit for bit, and what it publishes translates."""

import dataclasses
import json

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.inference.beam import BeamParams
from plinth.inference.translate import Translator
from plinth.models.hub import load_model
from plinth.models.recurrent_seq2seq import RecurrentSeq2SeqConfig
from plinth.recipes import parallel_batches
from plinth.recipes.recurrent_translation import RecurrentTranslationConfig, pretrain_recurrent
from plinth.recipes.translation_data import PairsConfig
from plinth.training.loop import TrainConfig
from recipes.parallel_toy import toy_pairs, write_toy

TRAIN = TrainConfig(steps=4, warmup_steps=1, dtype="float32", num_threads=2, checkpoint_every_s=0.0)
DATA = PairsConfig(pairs_per_step=16, micro_batch_size=8, tokenizer_size=290, max_seq_len=32)
SHAPE = RecurrentSeq2SeqConfig(embedding_size=12, hidden_size=16, dropout=0.2)
GRU = RecurrentTranslationConfig(model=SHAPE, train=TRAIN, data=DATA)
CONFIGS = {
    "gru, additive, own guesses": dataclasses.replace(GRU, teacher_forcing=0.5),
    "lstm, multiplicative, bf16, two vocabularies": dataclasses.replace(
        GRU,
        model=dataclasses.replace(SHAPE, cell="lstm", attention="multiplicative"),
        train=dataclasses.replace(TRAIN, dtype="bfloat16"),
        data=dataclasses.replace(DATA, shared_vocabulary=False),
    ),
}


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.fixture(autouse=True)
def one_thread():
    """Small products: more threads would only wait for one another where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), "train", toy_pairs(60))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_stopped_and_resumed_equals_never_stopped_dropout_and_all(files, tmp_path, monkeypatch, config):
    whole = pretrain_recurrent(tmp_path / "whole", files, config, held_out=files)
    batches = parallel_batches.ParallelBatches.at

    def until(self, step):
        if step == 2:
            raise Killed
        return batches(self, step)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(parallel_batches.ParallelBatches, "at", until)
        pretrain_recurrent(tmp_path / "cut", files, config)
    resumed = pretrain_recurrent(tmp_path / "cut", files, config, held_out=files, resume=True)
    states = [load_model(run.model_dir).state_dict() for run in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.summary["heldout_nats"] == resumed.summary["heldout_nats"]
    translator = Translator.load(resumed.path)
    assert (translator.source_tokenizer is translator.target_tokenizer) == config.data.shared_vocabulary


@pytest.mark.parametrize(
    ("family", "attention", "nats", "wanted"), [("gru", "additive", 0.2, 10), ("lstm", "multiplicative", 1.5, 2), ("lstm", "none", 1.0, 4)]
)
def test_a_batch_is_learnt_and_translated_from_the_command_line(family, attention, nats, wanted, tmp_path, capsys):
    pairs = toy_pairs(24, seed=3, longest=3)
    files = write_toy(tmp_path, "train", pairs)
    options = (
        "--data.tokenizer-size 300 --data.pairs-per-step 24 --data.micro-batch-size 12 --model.embedding-size 24 --model.hidden-size 48 "
        "--model.dropout 0 --train.dtype float32 --train.warmup-steps 5 --train.optimizer.lr 0.01 --train.steps 90"
    )
    arguments = ["pretrain", "--family", family, "--attention", attention, "--pairs", *map(str, files), "--held-out", *map(str, files)]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--json", *options.split()]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["heldout_nats"] < nats < 0.6 * summary["heldout_unigram_nats"]
    assert main(["translate", str(tmp_path / "run"), "--pairs", *map(str, files), "--limit", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["translations"]
    right = sum(one["text"] == target for one, (_, target) in zip(found, pairs))
    assert right >= wanted
    translator = Translator.load(tmp_path / "run")
    beams = translator.translate([source for source, _ in pairs[:6]], BeamParams(num_beams=3, max_tokens=40))
    for beam, greedy in zip(beams, found):
        assert beam.logprob >= greedy["logprob"] - 0.2  # the beam's counts its end too


def test_two_cells_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="--family gru and --model.cell lstm say two things"):
        from plinth.cli.pretrain_gru import main as train

        train(["--pairs", *map(str, files), "--out", str(tmp_path / "run"), "--model.cell", "lstm"])
    with pytest.raises(UserError, match="teacher_forcing=1.5 must lie between 0 and 1"):
        RecurrentTranslationConfig(teacher_forcing=1.5)
