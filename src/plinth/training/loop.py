"""The one training loop: batches and a loss go in, a run directory with metrics and checkpoints comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from plinth.config import UserError, check_least
from plinth.ops import kernels
from plinth.run import Progress, Run, usable_cores
from plinth.training.checkpoint import Position, Stateful, TrainingState
from plinth.training.compile import COMPILE_PAYS_STEPS, compiled_blocks
from plinth.training.device import check_device_name, choose_device, device_settings, peak_memory_bytes
from plinth.training.graphs import GraphedGradients
from plinth.training.optim import OptimizerConfig, Scale, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights, fastest_dtype
from plinth.training.saving import SavePolicy, open_checkpointer
from plinth.training.schedule import warmup_stable_decay
from plinth.training.spikes import BadBatchError, DescribeBatch, SpikeConfig, SpikeGuard, trace_rows
from plinth.training.step import Batch, LossFunction, open_workers, take_gradients, train_step
from plinth.training.stopping import Stopped, stop_requests
from plinth.training.telemetry import Telemetry, TelemetryConfig, gpu_ids


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train; the same for every stage."""

    steps: int | None = None
    """optimizer updates (default: as many as the stage's epochs or tokens give)"""
    warmup_steps: int = 10
    """updates over which the learning rate rises"""
    decay_fraction: float = 0.4
    """share of the updates, at the end, over which the learning rate falls to zero"""
    decay: Literal["sqrt", "linear"] = "sqrt"
    """how it falls: as 1 - sqrt, or linearly"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimizer"""
    clip_grad_norm: float = 1.0
    """largest gradient norm of an update; a guard"""
    dtype: str | None = None
    """dtype of the computation, bfloat16 or float32 (default: the faster here); the optimizer always holds float32"""
    device: str | None = None
    """where to compute: cpu, cuda or cuda:N (default: cuda where PyTorch sees a GPU, else cpu)"""
    compile: bool | None = None
    """compile the blocks of the model (default: on a GPU, for runs of 300 updates or more)"""
    cuda_graphs: bool = False
    """launch forward and backward of a micro-batch as one CUDA graph; for small models and batches of one shape"""
    tf32: bool = False
    """multiply fp32 matrices on a GPU in TF32: faster, 10 bits of fraction; bfloat16 products stay as they are"""
    deterministic: bool = False
    """equal runs give equal bits on a GPU too, slower; on a CPU they always do"""
    num_threads: int | None = None
    """worker threads of a CPU, each with one core (default: all usable cores)"""
    checkpoint_every_s: float = 60.0
    """seconds between checkpoints; 0 for one as soon as the one before is written"""
    keep_checkpoints: int = 2
    """newest checkpoints kept"""
    keep_every_steps: int | None = None
    """take a checkpoint at each multiple of so many steps and keep it for good (default: none)"""
    keep_pre_decay: bool = True
    """take a checkpoint before the learning rate falls and keep it for good, so that the run can be extended"""
    keep_final: bool = False
    """take a checkpoint after the last step and keep it, with the optimizer's state; model/ holds the weights anyway"""
    background_saves: bool = True
    """write checkpoints while training goes on; costs memory for one copy of weights and optimizer state"""
    seed: int = 0
    """seed of initialisation and order of batches"""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """updates that look wrong"""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """where metrics go, and what energy costs"""

    def __post_init__(self) -> None:
        check_least(self, "steps", "num_threads", "keep_checkpoints", "keep_every_steps")
        check_least(self, "seed", "warmup_steps", "checkpoint_every_s", least=0)
        if not self.clip_grad_norm > 0:
            raise UserError(f"clip_grad_norm={self.clip_grad_norm} must be positive; inf for no bound.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}.")
        check_device_name(self.device)
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(f"decay_fraction={self.decay_fraction} must lie between 0 and 1.")

    def resolved(self, steps: int | None = None) -> TrainConfig:
        """Fill in what the machine and the stage decide; `steps` counts where the user named none.

        Raises UserError when a tracker cannot be had here: before there is a run.
        """
        self.telemetry.check()
        device, steps = choose_device(self.device), self.steps or steps
        if self.compile and device == "cpu":
            raise UserError("compile=true is for GPUs: a CPU's operations are fused by hand. Leave it out, or name a GPU with --device.")
        if self.cuda_graphs and device == "cpu":
            raise UserError("cuda_graphs=true needs a GPU. Leave it out, or name a GPU with --device.")
        pays = device != "cpu" and (steps or 0) >= COMPILE_PAYS_STEPS
        return replace(
            self,
            steps=steps,
            dtype=self.dtype or fastest_dtype(device),
            device=device,
            compile=pays if self.compile is None else self.compile,
            num_threads=self.num_threads or usable_cores(),
        )

    def moved_to(self, device: str) -> TrainConfig:
        """Return the resolved configuration for going on on another device; what is for GPUs alone is decided anew."""
        return replace(self, device=device, compile=None, cuda_graphs=False).resolved()

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak learning rates at a step counted from 0."""
        assert self.steps is not None
        decay_steps = self.steps - self.decay_start
        linear = self.decay == "linear"
        return warmup_stable_decay(step, steps=self.steps, warmup_steps=self.warmup_steps, decay_steps=decay_steps, linear=linear)

    @property
    def decay_start(self) -> int:
        """Return the updates done before the learning rate begins to fall."""
        assert self.steps is not None
        return self.steps - round(self.steps * self.decay_fraction)

    def save_policy(self) -> SavePolicy:
        """Return when checkpoints are taken and which are kept for good."""
        assert self.steps is not None
        single = {self.decay_start} - {0, self.steps} if self.keep_pre_decay else set()
        return SavePolicy(
            every_s=self.checkpoint_every_s,
            keep=self.keep_checkpoints,
            keep_every_steps=self.keep_every_steps,
            keep_steps=frozenset(single | ({self.steps} if self.keep_final else set())),
            background=self.background_saves,
        )


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
