"""Pretraining an AWD-LSTM: state goes over from step to step, resuming changes nothing, and text is learnt."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from plinth.cli.pretrain import main
from plinth.config import UserError
from plinth.data.contiguous import ContiguousText
from plinth.data.shards import open_split
from plinth.models.hub import load_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.recipes import recurrent_pretraining
from plinth.recipes.recurrent_pretraining import AwdLstmPretrainConfig, carried_batches, heldout_loss, log_frequencies, pretrain_awd_lstm
from plinth.training.carried_state import CarriedState
from plinth.training.loop import TrainConfig
from plinth.training.objectives_recurrent import awd_lstm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers, train_step

MODEL = AwdLstmConfig(vocab_size=300, embedding_size=16, hidden_size=24, num_layers=2)
CONFIG = AwdLstmPretrainConfig(
    model=MODEL, seq_len=12, sequences_per_step=6, micro_batch_size=3, heldout_tokens=3000,
    train=TrainConfig(
        steps=8, warmup_steps=2, dtype="float32", num_threads=2, checkpoint_every_s=0.0, optimizer=OptimizerConfig(name="adamw", lr=0.01)
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Small products: more threads would only wait for one another where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(shards, out, config=CONFIG, **options):
    return pretrain_awd_lstm(out, [shards], shards.parent / "tokenizer", config, **options)


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_and_resumed_equals_never_stopped(shards, tmp_path, monkeypatch, dtype):
    config = replace(CONFIG, train=replace(CONFIG.train, dtype=dtype, background_saves=False))
    whole = run(shards, tmp_path / "whole", config)

    def batches(text, carried, step, size):
        if step == 5:
            raise Killed
        return carried_batches(text, carried, step, size)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(recurrent_pretraining, "carried_batches", batches)
        run(shards, tmp_path / "cut", config)
    resumed = run(shards, tmp_path / "cut", resume=True)
    states = [load_model(one.model_dir).state_dict() for one in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.summary["heldout_loss_nats"] == resumed.summary["heldout_loss_nats"]


def test_the_heads_bias_begins_at_the_log_frequencies(shards):
    counts = np.bincount(np.asarray(open_split(shards, "train").tokens[:]), minlength=305) + 1
    found = log_frequencies([shards], 305).softmax(0)
    torch.testing.assert_close(found, torch.from_numpy(counts / counts.sum()).float())


def test_a_step_begins_with_the_state_that_the_one_before_left(shards):
    model = AwdLstm(MODEL.without_dropout()).init_weights(torch.Generator().manual_seed(0))
    text = ContiguousText(shards, 4, 9, seed=0)
    carried = CarriedState(model.zero_state(4))
    loss = awd_lstm_loss(carried)
    losses = [sum(loss(model, batch)[0].item() for batch in carried_batches(text, carried, step, 2)) for step in range(3)]
    again = sum(loss(model, batch)[0].item() for batch in carried_batches(text, carried, 2, 4))  # looked at a second time, cut otherwise
    inputs, targets = (torch.cat([text.rows(step)[i] for step in range(3)], 1) for i in (0, 1))
    scores = model.logits(model(inputs))
    whole = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(4, 3, 9).sum((0, 2))
    torch.testing.assert_close(torch.tensor(losses), whole.detach())
    assert again == pytest.approx(losses[2], rel=1e-5)


def test_fresh_rows_begin_from_nothing(shards):
    model = AwdLstm(MODEL.without_dropout()).init_weights(torch.Generator().manual_seed(0))
    carried = CarriedState(model.zero_state(2))
    ones = [tuple(torch.ones(2, out) for _ in range(2)) for _, out in MODEL.layer_sizes]
    carried.begin(0, torch.tensor([True, True]))
    carried.write(torch.arange(2), ones)
    carried.begin(1, torch.tensor([False, True]))
    state = carried.read(torch.arange(2), torch.float32)
    assert all(bool((part[0] == 1).all()) and not part[1].any() for layer in state for part in layer)


def test_penalties_are_means_over_positions_and_any_split_gives_the_same_loss(shards):
    model = AwdLstm(MODEL.without_dropout()).init_weights(torch.Generator().manual_seed(0))
    text, totals = ContiguousText(shards, 4, 9, seed=0), []
    for size in (4, 1):
        carried = CarriedState(model.zero_state(4))
        loss = awd_lstm_loss(carried, activation_penalty=2.0, slowness_penalty=3.0)
        parts = [loss(model, batch) for batch in carried_batches(text, carried, 0, size)]
        totals.append((sum(total.item() for total, _, _ in parts), sum(float(metrics["nll_nats"]) for _, _, metrics in parts)))
    raw = model.run(text.rows(0).inputs_RT).raw[-1]
    expected = 2.0 * raw.square().mean() + 3.0 * (raw[:, 1:] - raw[:, :-1]).square().mean() * 8 / 9
    for total, nll in totals:
        assert (total - nll) / 36 == pytest.approx(expected.item(), rel=1e-3)


def test_it_learns_more_than_how_often_tokens_come(shards, tmp_path):
    model = replace(MODEL.without_dropout(0.2), embedding_size=32, hidden_size=64)
    config = replace(CONFIG, model=model, seq_len=20, sequences_per_step=16, micro_batch_size=8, train=replace(CONFIG.train, steps=150))
    found = run(shards, tmp_path / "run", config)
    train, heldout = (np.asarray(open_split(shards, split).tokens[:]) for split in ("train", "heldout"))
    counts = Counter(train.tolist())
    total = sum(counts.values()) + 300
    unigram = -sum(math.log((counts[token] + 1) / total) for token in heldout.tolist()) / len(heldout)
    assert found.summary["heldout_loss_nats"] < 0.6 * unigram
    last = json.loads((found.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["nll_nats"] < last["loss_nats"]


def test_one_batch_is_learnt_by_heart(shards):
    model = AwdLstm(replace(MODEL.without_dropout(), embedding_size=32, hidden_size=48)).init_weights(torch.Generator().manual_seed(0))
    carried = CarriedState(model.zero_state(4))
    (batch,) = carried_batches(ContiguousText(shards, 4, 10, seed=0), carried, 0, 4)
    masters = MasterWeights(model, torch.float32)
    optimizer = build_optimizer(masters, OptimizerConfig(name="adamw", lr=0.03))
    with open_workers(1) as workers:
        losses = [train_step(masters, awd_lstm_loss(carried), [batch], optimizer, workers).loss_nats for _ in range(140)]
    assert losses[-1] < 0.1 < 5 < losses[0]


def test_heldout_loss_is_that_of_the_text_read_in_one_go(shards):
    model = AwdLstm(MODEL).init_weights(torch.Generator().manual_seed(0))
    found = heldout_loss(model, [shards], 10, 10**9)
    text = ContiguousText(shards, recurrent_pretraining.HELDOUT_ROWS, 10, seed=0, split="heldout")
    rows = [text.rows(step) for step in range(text.steps_a_pass)]
    inputs, targets = (torch.cat([row[i] for row in rows], 1) for i in (0, 1))
    expected = torch.nn.functional.cross_entropy(model.logits(model(inputs)).flatten(0, 1), targets.flatten())
    assert found["heldout_loss_nats"] == pytest.approx(expected.item(), rel=1e-5) and found["heldout_tokens"] == targets.numel()


def test_the_command_trains_and_says_what_does_not_fit(shards, tmp_path, capsys):
    small = ["--model.embedding-size", "8", "--model.hidden-size", "8", "--model.num-layers", "1", "--train.steps", "2"]
    small += ["--sequences-per-step", "4", "--heldout-tokens", "500"]
    arguments = ["--family", "awd-lstm", str(shards), "--tokenizer", str(shards.parent / "tokenizer"), "--out"]
    assert main([*arguments, str(tmp_path / "run"), "--json", *small]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 2 and summary["heldout_loss_nats"] < 7
    assert load_model(tmp_path / "run" / "model").config.vocab_size == 300
    with pytest.raises(UserError, match="vocab_size=100 is below"):
        main([*arguments, str(tmp_path / "other"), "--model.vocab-size", "100", *small])
    assert not (tmp_path / "other").exists()
