"""The one training loop: batches and a loss go in, a run directory with metrics and checkpoints comes out."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from plinth.config import UserError
from plinth.run import Progress, Run, usable_cores
from plinth.training.checkpoint import load_checkpoint, save_checkpoint
from plinth.training.compile import COMPILE_PAYS_STEPS, compiled_blocks
from plinth.training.device import check_device_name, choose_device, device_settings, peak_memory_bytes
from plinth.training.graphs import GraphedGradients
from plinth.training.optim import OptimizerConfig, Scale, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights, fastest_dtype
from plinth.training.schedule import warmup_stable_decay
from plinth.training.step import Batch, LossFunction, NonFiniteError, open_workers, take_gradients, train_step


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train; the same for every stage."""

    steps: int | None = None
    """optimizer updates (default: as many as the stage's epochs or tokens give)"""
    warmup_steps: int = 10
    """updates over which the learning rate rises"""
    decay_fraction: float = 0.4
    """share of the updates, at the end, over which the learning rate falls to zero"""
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
    """seconds between checkpoints"""
    keep_checkpoints: int = 2
    """newest checkpoints kept"""
    seed: int = 0
    """seed of initialisation and order of batches"""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}.")
        check_device_name(self.device)
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(f"decay_fraction={self.decay_fraction} must lie between 0 and 1.")

    def resolved(self, steps: int | None = None) -> TrainConfig:
        """Fill in what the machine and the stage decide; `steps` counts where the user named none."""
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

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak learning rates at a step counted from 0."""
        assert self.steps is not None
        decay_steps = round(self.steps * self.decay_fraction)
        return warmup_stable_decay(step, steps=self.steps, warmup_steps=self.warmup_steps, decay_steps=decay_steps)


class Stopped(UserError):
    """Training was asked to stop, saved a checkpoint, and can be resumed."""


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
    resume: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train `model` in place for config.steps updates and return a summary; the model ends in float32.

    `batches_at(step)` gives the micro-batches of a step and must depend on nothing but the step: that makes a
    resumed run equal an uninterrupted one bit for bit. `scales` are the optimizer's factors by parameter.
    Metrics go to run.log, checkpoints to run.checkpoints_dir.
    Raises Stopped after Ctrl-C or SIGTERM, and UserError on a loss or gradient that is not finite, before the update.
    """
    assert config.steps and config.dtype and config.num_threads, "train() takes a resolved configuration"
    device = choose_device(config.device)
    masters = MasterWeights(model, DTYPES[config.dtype], device)
    optimizer = build_optimizer(masters, config.optimizer, scales)
    gradients = GraphedGradients() if config.cuda_graphs else take_gradients
    start_step = 0
    if resume:
        start_step, warnings = load_checkpoint(run, masters, optimizer)
        for warning in warnings:
            warn(f"{warning} Falling back to step {start_step}.")
        run.truncate_metrics(start_step)
    earlier = run.metrics()[-1:]
    clock = _Clock(earlier[0]["time_s"] if earlier else 0.0)
    tokens = earlier[0]["tokens"] if earlier else 0
    last_saved = time.monotonic()
    with (
        device_settings(device, tf32=config.tf32, deterministic=config.deterministic),
        open_workers(config.num_threads, device) as workers,
        compiled_blocks(model, bool(config.compile)),
        stop_requests() as stop,
        Progress(config.steps, description) as progress,
    ):
        progress.update(start_step)
        for step in range(start_step, config.steps):
            began = time.perf_counter()
            lr_scale = config.lr_scale(step)
            try:
                result = train_step(
                    masters, loss_function, batches_at(step), optimizer, workers,
                    lr_scale=lr_scale, clip_grad_norm=config.clip_grad_norm, gradients=gradients,
                )  # fmt: skip
            except NonFiniteError as error:
                raise UserError(
                    f"{description} stopped before update {step + 1}: {error} The weights are as of update {step}. "
                    f"Lower lr={config.optimizer.lr} or muon_lr={config.optimizer.muon_lr}."
                ) from None
            step_s = time.perf_counter() - began
            tokens += int(result.count)
            tokens_per_s = result.count / step_s
            mfu = tokens_per_s * flops_per_token / matmul_flops_per_s if flops_per_token and matmul_flops_per_s else None
            run.log(
                step=step + 1, time_s=round(clock.read(), 3), loss_nats=result.loss_nats,
                lr=config.optimizer.lr * lr_scale, grad_norm=result.grad_norm,
                tokens_per_s=round(tokens_per_s, 1), mfu=mfu, tokens=tokens, **result.metrics,
            )  # fmt: skip
            progress.update(1, note=_note(result.loss_nats, tokens_per_s, mfu))
            last = step + 1 == config.steps
            if not last and (stop.requested or time.monotonic() - last_saved > config.checkpoint_every_s):
                save_checkpoint(run, step + 1, masters, optimizer, keep=config.keep_checkpoints)
                last_saved = time.monotonic()
            if stop.requested and not last:
                raise Stopped(f"stopped after step {step + 1} of {config.steps}; saved. Continue with --resume.")
    model.float()
    masters.publish()
    model.to("cpu")
    return {
        "steps": config.steps,
        "tokens": tokens,
        "loss_nats": _recent_loss(run),
        "time_s": clock.read(),
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _note(loss: float, tokens_per_s: float, mfu: float | None) -> str:
    return f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s" + (f"  MFU {mfu:.0%}" if mfu else "")


def _recent_loss(run: Run) -> float:
    """Return the mean training loss of the last twentieth of the steps (at most 50), less noisy than the last step's."""
    records = run.metrics()
    window = records[-max(1, min(50, len(records) // 20)) :]
    return math.fsum(record["loss_nats"] for record in window) / len(window)


class _Clock:
    """Seconds of training, counted on over a resume."""

    def __init__(self, before: float):
        self._start = time.perf_counter() - before

    def read(self) -> float:
        return time.perf_counter() - self._start


class StopRequest:
    """Set by a signal, read between steps."""

    requested = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request that is honoured after the step; a second one interrupts."""
    request = StopRequest()
    previous: dict[int, Any] = {}

    def ask(signum: int, frame: Any) -> None:
        request.requested = True
        signal.signal(signum, previous[signum])

    with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere there is nothing to catch
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.getsignal(signum)
            signal.signal(signum, ask)
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
