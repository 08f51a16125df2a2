"""Stopping and resuming: a run killed at any step and resumed equals an uninterrupted one, bit for bit."""

import json
import os
import signal
import threading

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.run import Run
from plinth.training.checkpoint import list_checkpoints
from plinth.training.loop import Stopped, TrainConfig, train
from plinth.training.objectives import causal_lm_loss

CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48, max_seq_len=16
)
STEPS = 8


def batches_at(step):
    tokens = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(step))
    return [(tokens[i : i + 2, :-1], tokens[i : i + 2, 1:]) for i in (0, 2)]


def make_config(dtype="bfloat16", **changes):
    changes = {"checkpoint_every_s": 0.0, "keep_checkpoints": 99, "background_saves": False, "keep_pre_decay": False, **changes}
    return TrainConfig(steps=STEPS, warmup_steps=2, dtype=dtype, num_threads=2, **changes)


def run_training(path, *, resume=False, batches=batches_at, config=None, loss=causal_lm_loss, shape=CONFIG, **more):
    run = Run.open(path) if resume else Run.create(path, "pretrain", {})
    model = Transformer(shape).init_weights(torch.Generator().manual_seed(0))
    summary = train(run, model, loss, batches, config or make_config(), description="test", resume=resume, **more)
    return run, model.state_dict(), summary


class Killed(BaseException):
    """Stands for a power cut: nothing after it runs but the interpreter's own clean-up."""


def killed_at(step):
    def batches(now):
        if now == step:
            raise Killed
        return batches_at(now)

    return batches


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_killed_and_resumed_equals_never_stopped(tmp_path, dtype, step, background):
    config = make_config(dtype, background_saves=background)
    whole_run, whole, _ = run_training(tmp_path / "whole", config=config)
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(step), config=config)
    run, resumed, summary = run_training(tmp_path / "cut", resume=True, config=config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [r["step"] for r in run.metrics()] == list(range(1, STEPS + 1))
    assert [r["loss_nats"] for r in run.metrics()] == [r["loss_nats"] for r in whole_run.metrics()]
    assert summary["tokens"] == STEPS * 4 * 12


@pytest.fixture
def ctrl_c_interrupts():
    """Give Ctrl-C its meaning, which a shell takes from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signals", [["SIGINT"], ["SIGTERM"], ["SIGTERM", "SIGTERM"], ["SIGUSR1", "SIGTERM"]], ids="+".join)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, signals):
    def batches(step):
        if step == 4:
            for name in signals:  # schedulers send more than one
                os.kill(os.getpid(), getattr(signal, name))
        return batches_at(step)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Stopped, match="stopped after step 5 of 8; saved. Continue with --resume") as stopped:
        run_training(tmp_path / "cut", batches=batches, config=make_config(checkpoint_every_s=1e9))
    assert stopped.value.exit_code == 75
    _, resumed, _ = run_training(tmp_path / "cut", resume=True)
    _, whole, _ = run_training(tmp_path / "whole")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, ctrl_c_interrupts):
    def batches(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return batches_at(step)

    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", batches=batches)
    assert Run(tmp_path / "cut").last_step == 4


def test_a_non_finite_loss_names_the_step_and_keeps_the_checkpoints(tmp_path):
    poisoned = batches_at(3)[1][0][0]

    def loss(model, batch):
        total, count, metrics = causal_lm_loss(model, batch)
        return (total * float("inf") if any(torch.equal(row, poisoned) for row in batch[0]) else total), count, metrics

    with pytest.raises(UserError, match="stopped before update 4: .* not both finite"):
        run_training(tmp_path / "run", loss=loss, config=make_config())
    record = Run(tmp_path / "run").metrics()[-1]
    assert (record["event"], record["action"], record["rows"], record["documents"]) == ("non-finite", "stop", [2], "rows [2] of step 4")
    assert list_checkpoints(Run(tmp_path / "run"))[-1].name == "step_000003"


def test_metrics_carry_what_the_report_draws(tmp_path):
    run, _, _ = run_training(tmp_path / "run")
    record = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "time_s", "loss_nats", "lr", "grad_norm", "tokens_per_s", "mfu", "tokens"} <= set(record)
    assert record["tokens"] == STEPS * 4 * 12
