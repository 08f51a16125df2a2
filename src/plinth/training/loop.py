"""The one training loop: batches and a loss go in, a run directory with metrics and checkpoints comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from plinth.ops import kernels
from plinth.run import Progress, Run
from plinth.training.checkpoint import Position, Stateful, TrainingState
from plinth.training.compile import compiled_blocks
from plinth.training.config import TrainConfig
from plinth.training.device import choose_device, device_settings, peak_memory_bytes
from plinth.training.graphs import GraphedGradients
from plinth.training.optim import Scale, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights
from plinth.training.saving import open_checkpointer
from plinth.training.spikes import BadBatchError, DescribeBatch, SpikeGuard, trace_rows
from plinth.training.step import Batch, LossFunction, open_workers, take_gradients, train_step
from plinth.training.stopping import Stopped, stop_requests
from plinth.training.telemetry import Telemetry, gpu_ids


def train(
    run: Run,
    model: nn.Module,
    loss_function: LossFunction,
    batches_at: Callable[[int], Sequence[Batch]],
    config: TrainConfig,
    *,
    description: str,
    flops_per_token: float | None = None,
    matmul_flops_per_s: float | None = None,
    scales: dict[str, Scale] | None = None,
    lr_scale: Callable[[int], float] | None = None,
    masters: Any = None,
    describe_batch: DescribeBatch = lambda step, rows: f"rows {list(rows)} of step {step + 1}" if rows else f"all of step {step + 1}",
    data_metrics: Callable[[int], dict[str, float]] = lambda steps: {},
    data: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    extra_state: Mapping[str, Stateful] | None = None,
    resume: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train `model` in place for config.steps updates and return a summary; the model ends in float32.

    `batches_at(step)` gives the micro-batches of a step and must depend on nothing but the step: that makes a
    resumed run equal an uninterrupted one bit for bit. `scales` are the optimizer's factors by parameter, `lr_scale`
    gives the one at a step where it is not the configuration's own schedule. `masters` are the weights of
    a `model` that is spread over ranks (ShardedWeights); without, they are made here. Then each rank calls this with its own share of
    the batches and a run of its own, of which only the leader's is kept; and the model stays spread.
    `data_metrics(steps)` says what so many steps have read, for their line of the metrics.
    Metrics go to run.log, checkpoints to run.checkpoints_dir.
    `describe_batch(step, rows)` names the documents of a batch that looks wrong.
    `data`, `generators` and `extra_state` are saved and restored with the rest: see TrainingState.
    Raises Stopped after Ctrl-C, SIGTERM or SIGUSR1, and BadBatchError (a UserError) before an update that is not to be made: config.spikes.
    """
    assert config.steps and config.dtype and config.num_threads, "train() takes a resolved configuration"
    device = choose_device(config.device)
    masters = masters or MasterWeights(model, DTYPES[config.dtype], device)
    ranks = masters.ranks
    optimizer = build_optimizer(masters, config.optimizer, scales)
    if device == "cpu" and config.dtype == "bfloat16" and kernels.compiler_missing():
        warn(f"{kernels.why_not()}: training runs about half as fast as with one. Install gcc or clang.")
    gradients = GraphedGradients() if config.cuda_graphs else take_gradients
    telemetry = Telemetry(
        run, config.telemetry, cores=config.num_threads * (ranks.world_size if ranks else 1), gpus=gpu_ids(device),
        flops_per_token=flops_per_token, matmul_flops_per_s=matmul_flops_per_s, warn=warn,
    )  # fmt: skip

    def trace(step: int, measure: str) -> tuple[tuple[int, ...], str]:
        rows = trace_rows(masters, loss_function, batches_at(step), measure)
        return rows, "; ".join(describe_batch(step, rows or None).splitlines())

    guard = SpikeGuard(config.spikes, trace, advice=_advice(run, config), warn=warn)
    state = TrainingState(masters, optimizer, data=data, generators=generators, extra=extra_state)
    with (
        open_checkpointer(run, state, config.save_policy(), warn) as checkpoints,
        telemetry,
        device_settings(device, tf32=config.tf32, deterministic=config.deterministic),
        open_workers(config.num_threads, device, inline=ranks is not None) as workers,
        compiled_blocks(model, bool(config.compile)),
        stop_requests() as stop,
        Progress(config.steps, description, shown=ranks is None or ranks.is_leader) as progress,
    ):
        position = checkpoints.resume() if resume else checkpoints.begin()
        guard.restore(run.metrics())
        telemetry.begin(position.step)
        clock = _Clock(position.time_s)
        progress.update(position.step)
        for step in range(position.step, config.steps):
            began = time.perf_counter()
            factor, batches = (lr_scale or config.lr_scale)(step), batches_at(step)
            try:
                result = train_step(
                    masters, loss_function, batches, optimizer, workers,
                    lr_scale=factor, clip_grad_norm=config.clip_grad_norm, gradients=gradients,
                    allows=partial(guard.allows, step),
                )  # fmt: skip
            except BadBatchError as error:
                telemetry.log_stop(error.incident)
                checkpoints.save_now(position)
                raise
            position = Position(step + 1, position.tokens + int(result.count), clock.read())
            note = telemetry.log(
                step + 1, result, lr=config.optimizer.lr * factor, step_s=time.perf_counter() - began,
                time_s=position.time_s, tokens=position.tokens, incident=guard.incident, more=data_metrics(step + 1),
            )  # fmt: skip
            progress.update(1, note=note)
            last = step + 1 == config.steps
            checkpoints.after_step(position, last)
            if masters.any(stop.requested) and not last:
                checkpoints.save_now(position)
                raise Stopped(f"stopped after step {step + 1} of {config.steps}; saved. Continue with --resume.")
        time_s = clock.read()
        spent = telemetry.summary(time_s)
    masters.finish()
    return {
        "steps": config.steps,
        "tokens": position.tokens,
        "loss_nats": _recent_loss(run),
        "time_s": time_s,
        "peak_memory_bytes": peak_memory_bytes(device),
        "kernels": "own" if kernels.why_not() is None else "torch",
        **spent,
    }


def _advice(run: Run, config: TrainConfig) -> str:
    """Say how to go on after a stop before a bad update."""
    return (
        f"The weights before it are saved. Lower lr={config.optimizer.lr} or muon_lr={config.optimizer.muon_lr} in a new run; or leave "
        f"the update out: set on_spike or on_nonfinite under train.spikes to skip in {run.path}/config.json, and continue with --resume."
    )


def _recent_loss(run: Run) -> float:
    """Return the mean training loss of the last twentieth of the steps (at most 50), less noisy than the last step's."""
    losses = [record["loss_nats"] for record in run.metrics() if record.get("loss_nats") is not None]
    window = losses[-max(1, min(50, len(losses) // 20)) :]
    return math.fsum(window) / len(window) if window else math.nan


class _Clock:
    """Seconds of training, counted on over a resume."""

    def __init__(self, before: float):
        self._start = time.perf_counter() - before

    def read(self) -> float:
        return time.perf_counter() - self._start
