"""Stopping and resuming: a run killed at any step and resumed equals an uninterrupted one, bit for bit."""

import json
import os
import signal
import threading

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.tensor_file import save_tensors
from plinth.models.transformer import Transformer
from plinth.run import Run
from plinth.training.checkpoint import STATE_FILE, list_checkpoints
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
    changes = {"checkpoint_every_s": 0.0, "keep_checkpoints": 99, **changes}
    return TrainConfig(steps=STEPS, warmup_steps=2, dtype=dtype, num_threads=2, **changes)


def run_training(path, *, resume=False, batches=batches_at, config=None, loss=causal_lm_loss, warn=lambda text: None):
    run = Run.open(path) if resume else Run.create(path, "pretrain", {})
    model = Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))
    summary = train(run, model, loss, batches, config or make_config(), description="test", resume=resume, warn=warn)
    return run, model.state_dict(), summary


class Killed(BaseException):
    """Stands for a power cut: nothing after it runs but the interpreter's own clean-up."""


def killed_at(step):
    def batches(now):
        if now == step:
            raise Killed
        return batches_at(now)

    return batches


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_killed_and_resumed_equals_never_stopped(tmp_path, dtype, step):
    whole_run, whole, _ = run_training(tmp_path / "whole", config=make_config(dtype))
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(step), config=make_config(dtype))
    run, resumed, summary = run_training(tmp_path / "cut", resume=True, config=make_config(dtype))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [r["step"] for r in run.metrics()] == list(range(1, STEPS + 1))
    assert [r["loss_nats"] for r in run.metrics()] == [r["loss_nats"] for r in whole_run.metrics()]
    assert summary["tokens"] == STEPS * 4 * 12


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    def batches(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return batches_at(step)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Stopped, match="stopped after step 5 of 8; saved. Continue with --resume"):
        run_training(tmp_path / "cut", batches=batches, config=make_config(checkpoint_every_s=1e9))
    _, resumed, _ = run_training(tmp_path / "cut", resume=True)
    _, whole, _ = run_training(tmp_path / "whole")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    _, whole, _ = run_training(tmp_path / "whole")
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(5))
    newest = list_checkpoints(Run(tmp_path / "cut"))[-1]
    assert newest.name == "step_000005"
    file = newest / STATE_FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-100])
    told = []
    _, resumed, _ = run_training(tmp_path / "cut", resume=True, warn=told.append)
    assert "step_000005" in told[0] and "damaged" in told[0] and "Falling back to step 4" in told[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_no_sound_checkpoint_is_an_error(tmp_path):
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(2))
    for checkpoint in list_checkpoints(Run(tmp_path / "cut")):
        (checkpoint / STATE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        run_training(tmp_path / "cut", resume=True)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run, _, _ = run_training(tmp_path / "run", config=make_config(keep_checkpoints=2))
    assert [p.name for p in list_checkpoints(run)] == ["step_000006", "step_000007"]


def test_an_unfinished_checkpoint_is_never_read(tmp_path, monkeypatch):
    calls = []

    def failing_save(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return save_tensors(tensors, path)

    monkeypatch.setattr("plinth.training.checkpoint.save_tensors", failing_save)
    with pytest.raises(OSError, match="No space left"):
        run_training(tmp_path / "full")
    checkpoints = tmp_path / "full" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_000001", "step_000002"]
    monkeypatch.undo()
    _, resumed, _ = run_training(tmp_path / "full", resume=True)
    _, whole, _ = run_training(tmp_path / "whole")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


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
