"""What this machine can do: matrix rate by dtype, memory, bandwidth, and real training steps, in some seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from plinth.models import cost
from plinth.models.config import DecoderConfig
from plinth.ops.roofline import copy_bandwidth, matmul_rate
from plinth.run import describe_hardware, usable_cores
from plinth.scaling.timing import StepTiming, TimeModel, fit_time_model, step_cost

CGROUP = Path("/sys/fs/cgroup")
DTYPES = ("float32", "bfloat16")
BF16_ADVANTAGE = 1.3  # below this bf16 does not pay for the copies of the weights that it needs
PROBE_SEQ_LEN = 256
PROBE_TOKENS = {"cpu": 4096, "cuda": 65_536}  # a step's
PROBE_STEPS = 3  # after one that warms up
PROBE_LIMIT_S = 7.0
PROBE_SHAPES = (  # vocab_size, hidden_size, num_layers, head_dim
    (2048, 128, 3, 32),
    (4096, 256, 6, 32),
    (2048, 512, 4, 64),
)


class Throughput(Protocol):
    """What a measurement of training returns."""

    @property
    def tokens_per_s(self) -> float: ...

    @property
    def step_s(self) -> float: ...

    @property
    def peak_memory_bytes(self) -> int: ...


class MeasureTraining(Protocol):
    """Runs a few real training steps, which another layer owns: `training.throughput.measure_tokens_per_s`."""

    def __call__(
        self,
        config: DecoderConfig,
        *,
        micro_batch_size: int,
        seq_len: int,
        dtype: str,
        optimizer: str,
        steps: int,
        seed: int,
        device: str,
    ) -> Throughput: ...


@dataclass(frozen=True)
class TrainPoint:
    """A measured training speed."""

    config: DecoderConfig
    """the model trained"""
    micro_batch_size: int
    """sequences a forward pass; each worker thread does one"""
    tokens_per_step: int
    """tokens an update, all workers together"""
    seq_len: int
    """tokens a sequence"""
    dtype: str
    """dtype of the matrix products"""
    optimizer: str
    """adamw or muon"""
    tokens_per_s: float
    """tokens a second, forward, backward and update"""
    step_s: float
    """seconds a step"""
    peak_memory_bytes: int
    """largest memory of the process so far, bytes"""


@dataclass(frozen=True)
class Probe:
    """The machine as measured."""

    cpu: str
    """name of the processor, behind that of the GPU where one was measured"""
    cores: int
    """cores that this process may use"""
    memory_bytes: int
    """memory that this process may use, bytes; the GPU's where one was measured"""
    memory_source: str
    """what sets memory_bytes: the machine, the control group or the GPU"""
    dtype: str
    """dtype chosen for matrix products: bfloat16 where it is measured to be faster, else float32"""
    matmul_flops_per_s: dict[str, float]
    """rate of a large matrix product by dtype, FLOP/s"""
    bandwidth_bytes_per_s: float
    """memory bandwidth of a copy, bytes read and written a second"""
    train_points: tuple[TrainPoint, ...]
    """measured training speeds"""
    time_model: TimeModel
    """seconds of a step for any shape, fitted to train_points"""
    probe_s: float
    """how long the measurements took, seconds"""
    load_average: float = 0.0
    """processes that wanted a core in the minute before the probe; other work slows what is measured"""
    process_bytes: int = 0
    """memory that this process held after the probe, before training"""
    device: str = "cpu"
    """what was measured and will train: cpu, cuda or cuda:N"""

    @property
    def workers(self) -> int:
        """Return how many micro-batches run side by side: one a core, or one on a GPU."""
        return self.cores if self.device == "cpu" else 1


def probe_machine(
    measure_training: MeasureTraining,
    *,
    device: str = "cpu",
    seed: int = 0,
    limit_s: float = PROBE_LIMIT_S,
    on_progress: Callable[[str], None] | None = None,
) -> Probe:
    """Measure the machine, or the GPU that `device` names: at most `limit_s` seconds and one more training shape.

    `measure_training` is `plinth.training.throughput.measure_tokens_per_s`. `on_progress` gets one line before each
    measurement. A shape that would pass the limit is left out; the time
    model then leans on the matrix rate and the bandwidth.
    """
    say = on_progress or (lambda line: None)
    started = time.perf_counter()
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    say("matrix products")
    rates = {dtype: matmul_rate(dtype, device=device, seed=seed) for dtype in DTYPES}
    dtype = "bfloat16" if rates["bfloat16"] > BF16_ADVANTAGE * rates["float32"] else "float32"
    say("memory")
    bandwidth = copy_bandwidth(device=device)
    hardware = describe_hardware()
    gpu = hardware["gpus"][int(device.partition(":")[2] or 0)] if device != "cpu" else None
    memory_bytes, memory_source = (gpu["memory_bytes"], "the GPU") if gpu else usable_memory()
    measure = partial(measure_training, dtype=dtype, optimizer="adamw", steps=PROBE_STEPS, seed=seed, device=device)
    points = _measure_shapes(measure, rates[dtype], bandwidth, dtype, device, started + limit_s, say)
    return Probe(
        cpu=f"{gpu['name']}, {hardware['cpu']}" if gpu else hardware["cpu"],
        cores=usable_cores(),
        memory_bytes=memory_bytes,
        memory_source=memory_source,
        dtype=dtype,
        matmul_flops_per_s=rates,
        bandwidth_bytes_per_s=bandwidth,
        train_points=tuple(points),
        time_model=_time_model(points, rates[dtype], bandwidth),
        probe_s=time.perf_counter() - started,
        load_average=load_average,
        process_bytes=0 if gpu else resident_bytes(),
        device=device,
    )


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int:
    """Return the memory that this process holds, 0 where the system does not tell."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def usable_memory(cgroup: Path = CGROUP) -> tuple[int, str]:
    """Return (bytes, what sets it): the machine's memory or the limit of the control group, whichever is less."""
    memory = describe_hardware()["memory_bytes"] or 4 << 30
    source = "the machine"
    for path in cgroup_limit_files(cgroup):
        try:
            limit = int(path.read_text().strip())
        except (OSError, ValueError):  # absent, or `max`: no limit
            continue
        if 0 < limit < memory:
            memory, source = limit, "the control group"
    return memory, source


def cgroup_limit_files(cgroup: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Return the files that may limit this process's memory: its own group's and its parents', of both versions."""
    roots = [(cgroup, "memory.max"), (cgroup / "memory", "memory.limit_in_bytes")]
    files = [root / name for root, name in roots]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, controllers, group = line.split(":", 2)
        version = 0 if controllers == "" else 1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        root, name = roots[version]
        parts = [part for part in group.split("/") if part not in ("", "..")]
        files += [root.joinpath(*parts[: depth + 1]) / name for depth in range(len(parts))]
    return files


def probe_config(vocab_size: int, hidden_size: int, num_layers: int, head_dim: int) -> DecoderConfig:
    """Return a decoder for a speed measurement."""
    heads = hidden_size // head_dim
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=3 * hidden_size,
        max_seq_len=PROBE_SEQ_LEN,
    )


def _measure_shapes(
    measure: Callable[..., Throughput],
    rate: float,
    bandwidth: float,
    dtype: str,
    device: str,
    deadline: float,
    say: Callable[[str], None],
) -> list[TrainPoint]:
    """Time training steps at each probe shape, as many as fit before the deadline, at least one shape."""
    points: list[TrainPoint] = []
    workers = usable_cores() if device == "cpu" else 1
    for index, shape in enumerate(PROBE_SHAPES):
        config = probe_config(*shape)
        sequence_s = _time_model(points, rate, bandwidth).step_s(step_cost(config, PROBE_SEQ_LEN, PROBE_SEQ_LEN, "adamw"))
        share_s = (deadline - time.perf_counter()) / (len(PROBE_SHAPES) - index)
        per_worker = int(share_s / (PROBE_STEPS + 1) / sequence_s / workers)
        if points and per_worker < 1:  # a slow or busy machine: what is measured must do
            break
        say(f"training steps, {config.num_layers} layers x {config.hidden_size}")
        most = max(1, PROBE_TOKENS[device.partition(":")[0]] // PROBE_SEQ_LEN // workers)
        points.append(_measure(measure, config, min(max(1, per_worker), most), dtype))
    return points


def _measure(measure: Callable[..., Throughput], config: DecoderConfig, micro_batch_size: int, dtype: str) -> TrainPoint:
    sample = measure(config, micro_batch_size=micro_batch_size, seq_len=PROBE_SEQ_LEN)
    return TrainPoint(
        config=config,
        micro_batch_size=micro_batch_size,
        tokens_per_step=round(sample.tokens_per_s * sample.step_s),
        seq_len=PROBE_SEQ_LEN,
        dtype=dtype,
        optimizer="adamw",
        tokens_per_s=sample.tokens_per_s,
        step_s=sample.step_s,
        peak_memory_bytes=int(sample.peak_memory_bytes),
    )


def _time_model(points: list[TrainPoint], rate: float, bandwidth: float) -> TimeModel:
    timings = [StepTiming(step_cost(p.config, p.tokens_per_step, p.seq_len, p.optimizer), p.step_s) for p in points]
    return fit_time_model(timings, rate, bandwidth)


def mfu(probe: Probe, config: DecoderConfig, seq_len: int, tokens_per_s: float) -> float:
    """Return the share of the measured matrix rate that training at `tokens_per_s` uses."""
    return tokens_per_s * cost.train_flops_per_token(config, seq_len) / probe.matmul_flops_per_s[probe.dtype]
