"""The plan of a training run on a cluster: every layout weighed, the fastest that fits, what it takes, and why not another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from plinth.config import UserError
from plinth.energy import JOULES_PER_KWH
from plinth.scaling.accelerators import Accelerator, find_accelerator
from plinth.scaling.cluster_config import ClusterConfig, Layout
from plinth.scaling.cluster_memory import GpuMemory, gpu_memory
from plinth.scaling.cluster_time import StepTime, step_time
from plinth.scaling.known_models import ModelShape, find_model
from plinth.scaling.laws import BESIROGLU, STEP_LAW

MAX_PIPELINE = 32
MAX_MICRO_BATCH = 32
MIN_CONTEXT_TOKENS = 4096  # a shorter part of a sequence a rank leaves a ring of keys and values nothing to hide behind
MAX_CHUNKS = 4  # chunks of layers a rank holds in an interleaved pipeline
EQUAL = 0.03  # layouts whose steps differ by less count as equal, and the simplest is taken: the model cannot tell them apart
DEFAULT_SEQ_LEN = 8192
CHECKPOINTING = ("none", "selective", "alternate", "block")


@dataclass(frozen=True)
class Workload:
    """What is trained, on what, before it is laid out."""

    shape: ModelShape
    """the model"""
    gpu: Accelerator
    """the accelerator, with the links and power that were asked for"""
    seq_len: int
    """context, tokens"""
    tokens: float
    """training tokens"""
    tokens_per_step: int
    """tokens an update"""
    config: ClusterConfig
    """what the user asked for"""

    @property
    def sequences(self) -> int:
        """Sequences a step."""
        return self.tokens_per_step // self.seq_len

    @property
    def usable_bytes(self) -> float:
        """Memory of an accelerator without the margin."""
        return self.gpu.memory_bytes * (1 - self.config.memory_margin)


@dataclass(frozen=True)
class Option:
    """One layout with what it needs."""

    layout: Layout
    """how the work is laid out"""
    micro_batches: int
    """micro-batches a step and data-parallel rank"""
    memory: GpuMemory
    """bytes of the fullest accelerator"""
    step: StepTime | None = None
    """seconds of a step; None where it does not fit"""

    @property
    def step_s(self) -> float:
        """Seconds of a step, infinite where it does not fit."""
        return math.inf if self.step is None else self.step.total_s

    @property
    def runs_in_plinth(self) -> bool:
        """Say whether Plinth itself can run it; with one micro-batch gradients are reduced once in any case."""
        layout = replace(self.layout, reduce_each=False) if self.micro_batches == 1 else self.layout
        return layout.runs_in_plinth

    @property
    def simplicity(self) -> tuple:
        """Order of preference among layouts that are equally fast."""
        layout = self.layout
        more = (layout.pipeline, layout.context, layout.tensor, layout.replicate > 1, CHECKPOINTING.index(layout.checkpointing))
        return (*more, not layout.reshard, layout.reduce_each, -layout.micro_batch_size)


@dataclass(frozen=True)
class ClusterPrediction:
    """What the chosen layout comes to."""

    step_s: float
    """seconds a step"""
    tokens_per_s: float
    """tokens a second, all accelerators"""
    tokens_per_s_per_gpu: float
    """tokens a second, one accelerator"""
    mfu: float
    """model FLOPs over peak bf16 FLOPs; attention counted in full, the convention of PaLM and of most published numbers"""
    mfu_causal: float
    """the same with causal attention, which is what kernels compute"""
    hfu: float
    """mfu_causal with what is computed again"""
    days: float
    """days of training without interruptions"""
    gpu_hours: float
    """hours of one accelerator"""
    energy_kwh: float
    """energy with hosts and data centre, an estimate"""
    co2_kg: float | None
    """CO2 equivalent; None without a grid factor"""
    cost: float | None
    """price, in the currency of price_per_gpu_hour; None without it"""
    loss_nats: float
    """loss that the corrected Chinchilla law expects, nats a token of its tokenizer"""


@dataclass(frozen=True)
class ClusterPlan:
    """A plan for a cluster: what was asked, what was chosen, what it takes, what else there was."""

    config: ClusterConfig
    """what was asked for"""
    model: str
    """the model"""
    num_params: int
    """its parameters"""
    accelerator: str
    """the accelerator"""
    seq_len: int
    """context, tokens"""
    tokens: float
    """training tokens"""
    tokens_per_step: int
    """tokens an update"""
    steps: int
    """updates"""
    chosen: Option
    """layout, memory and time of a step"""
    runs_in_plinth: bool
    """whether Plinth runs this layout"""
    usable_bytes: float
    """memory of an accelerator that the plan may fill"""
    predicted: ClusterPrediction
    """what to expect"""
    alternatives: tuple[Option, ...]
    """runners-up, by time"""
    explanations: tuple[str, ...]
    """why this layout and not a simpler one"""
    warnings: tuple[str, ...]
    """what to doubt"""
    sources: dict[str, str]
    """where the numbers come from"""


def make_cluster_plan(config: ClusterConfig) -> ClusterPlan:
    """Weigh all layouts and return the plan of the fastest that fits.

    With parallelism="plinth" that is the fastest that Plinth runs; where none of those fits, the fastest of any, marked as beyond.
    Raises UserError when the model, the accelerator or a degree is impossible, when the batch cannot be dealt, and when nothing fits.
    """
    from plinth.scaling.cluster_explain import doubts, explain, plan_sources

    work = describe_workload(config)
    options = weigh(work)
    fitting = [option for option in options if option.step is not None]
    if not fitting:
        raise UserError(_nothing_fits(work, options))
    allowed = [option for option in fitting if option.runs_in_plinth] if config.parallelism == "plinth" else fitting
    ranked = rank(allowed or fitting)
    chosen = ranked[0]
    return ClusterPlan(
        config=config,
        model=work.shape.name,
        num_params=work.shape.num_params,
        accelerator=work.gpu.label,
        seq_len=work.seq_len,
        tokens=work.tokens,
        tokens_per_step=work.tokens_per_step,
        steps=math.ceil(work.tokens / work.tokens_per_step),
        chosen=chosen,
        runs_in_plinth=chosen.runs_in_plinth,
        usable_bytes=work.usable_bytes,
        predicted=predict(work, chosen),
        alternatives=tuple(_distinct(ranked[1:], chosen, config.alternatives)),
        explanations=tuple(explain(work, options, chosen)),
        warnings=tuple(doubts(work, chosen)),
        sources=plan_sources(work),
    )


def describe_workload(config: ClusterConfig) -> Workload:
    """Resolve what the configuration leaves open: context, tokens, batch, links and power."""
    shape, gpu = find_model(config.model), find_accelerator(config.gpu)
    gpu.matmul_rate(config.dtype)  # an accelerator without fp8 is refused before anything is weighed
    if config.network_gbps is not None:
        gpu = replace(gpu, network_bandwidth=config.network_gbps * 1e9 / 8)
    if config.watts_per_gpu is not None:
        gpu = replace(gpu, watts=config.watts_per_gpu)
    seq_len = config.seq_len or shape.seq_len or min(DEFAULT_SEQ_LEN, shape.decoder.max_seq_len)
    tokens = config.tokens or BESIROGLU.optimal_tokens(shape.num_params)
    tokens_per_step = config.tokens_per_step or _choose_tokens_per_step(tokens, seq_len, config.gpus)
    if tokens_per_step % seq_len:
        raise UserError(f"tokens_per_step={tokens_per_step} is not a multiple of seq_len={seq_len}. Name a seq_len that divides it.")
    return Workload(shape, gpu, seq_len, tokens, tokens_per_step, config)


def _choose_tokens_per_step(tokens: float, seq_len: int, gpus: int) -> int:
    """Return Step Law's batch in whole sequences: a round number an accelerator, or a divisor of those."""
    sequences = STEP_LAW.tokens_per_step(tokens) / seq_len
    if sequences < gpus:
        return max(d for d in divisors(gpus) if d <= max(1.0, sequences)) * seq_len
    grain = 2 ** max(0, int(math.log2(sequences / gpus)) - 2)  # three binary digits, so that micro-batches of several sizes divide it
    return round(sequences / gpus / grain) * grain * gpus * seq_len


def weigh(work: Workload) -> list[Option]:
    """Return every layout with its memory, and its time where it fits. Raises UserError where the degrees leave no layout."""
    found, margin = [], math.ceil(work.gpu.memory_bytes - work.usable_bytes)
    for layout, micro_batches in layouts(work):
        memory = gpu_memory(
            work.shape,
            layout,
            work.seq_len,
            micro_batches,
            optimizer=work.config.optimizer,
            chunked_loss=work.config.chunked_loss,
            margin=margin,
        )
        step = _step(work, layout, micro_batches) if memory.total <= work.gpu.memory_bytes else None
        found.append(Option(layout, micro_batches, memory, step))
    if not found:
        raise UserError(
            f"no layout of gpus={work.config.gpus} deals {work.sequences} sequences a step (tokens_per_step={work.tokens_per_step}, "
            f"seq_len={work.seq_len}) evenly to the degrees asked for. Use a multiple of {work.config.gpus * work.seq_len} tokens a step, "
            "or leave out a degree."
        )
    return found


def _step(work: Workload, layout: Layout, micro_batches: int) -> StepTime:
    config = work.config
    return step_time(
        work.shape,
        layout,
        work.gpu,
        work.seq_len,
        micro_batches,
        gpus_per_node=config.gpus_per_node,
        dtype=config.dtype,
        optimizer=config.optimizer,
    )


def layouts(work: Workload) -> Iterator[tuple[Layout, int]]:
    """Yield (layout, micro-batches) for every way to divide accelerators and batch that the model's sizes allow."""
    config, decoder = work.config, work.shape.decoder
    tensors = tensor_degrees(work)
    pipelines = [d for d in divisors(config.gpus) if d <= min(MAX_PIPELINE, decoder.num_layers)]
    contexts = [d for d in divisors(config.gpus) if d == 1 or work.seq_len // d >= MIN_CONTEXT_TOKENS]
    for tensor in _chosen(config.tensor, tensors, "tensor", "num_heads, num_kv_heads or intermediate_size"):
        for pipeline in _chosen(config.pipeline, pipelines, "pipeline", f"num_layers={decoder.num_layers}, or is above {MAX_PIPELINE}"):
            for context in _chosen(
                config.context, contexts, "context", f"seq_len={work.seq_len} into parts of {MIN_CONTEXT_TOKENS} and more"
            ):
                if config.gpus % (tensor * pipeline * context) == 0:
                    yield from _data_layouts(work, Layout(tensor=tensor, pipeline=pipeline, context=context))


def tensor_degrees(work: Workload) -> list[int]:
    """Return the tensor-parallel degrees that fit in a node and divide heads, key and value heads and features."""
    decoder = work.shape.decoder
    sizes = (decoder.num_heads, decoder.num_kv_heads, decoder.intermediate_size)
    return [d for d in divisors(min(work.config.gpus, work.config.gpus_per_node)) if not any(size % d for size in sizes)]


def _chosen(asked: int | None, possible: list[int], name: str, why: str) -> list[int]:
    if asked is None:
        return possible
    if asked not in possible:
        raise UserError(f"{name}={asked} does not divide {why}. Possible: {', '.join(map(str, possible))}.")
    return [asked]


def _data_layouts(work: Workload, layout: Layout) -> Iterator[tuple[Layout, int]]:
    config = work.config
    data = config.gpus // layout.gpus
    if work.sequences % data:
        return
    each = work.sequences // data
    sizes = [2**i for i in range(MAX_MICRO_BATCH.bit_length())] if config.micro_batch_size is None else [config.micro_batch_size]
    chunks = min(MAX_CHUNKS, work.shape.decoder.num_layers // layout.pipeline) if layout.pipeline > 1 else 1
    for shard in [d for d in divisors(data) if config.shard in (None, d)]:
        for size in [size for size in sizes if each % size == 0]:
            for checkpointing in CHECKPOINTING if config.checkpointing is None else (config.checkpointing,):
                base = replace(
                    layout,
                    replicate=data // shard,
                    shard=shard,
                    micro_batch_size=size,
                    checkpointing=checkpointing,
                    virtual_stages=chunks,
                )
                for variant in _variants(base, each // size):
                    yield variant, each // size


def _variants(base: Layout, micro_batches: int) -> Iterator[Layout]:
    """Yield what Plinth does (parameters freed, gradients reduced once, norms whole on tensor-parallel ranks), then what others do."""
    sharded = base.state_ranks > 1
    plinth = replace(base, reshard=sharded, reduce_each=False, sequence_parallel=base.tensor == 1)
    yield plinth
    better = replace(plinth, sequence_parallel=True)
    if base.tensor > 1:
        yield better
    if sharded:
        yield replace(better, reshard=False)
        if micro_batches > 1:
            yield replace(better, reduce_each=True)


def rank(options: Sequence[Option]) -> list[Option]:
    """Return options by time; the simplest of those that count as equal to the fastest is put first."""
    ordered = sorted(options, key=lambda option: option.step_s)
    equal = [option for option in ordered if option.step_s <= ordered[0].step_s * (1 + EQUAL)]
    first = min(equal, key=lambda option: option.simplicity)
    return [first, *(option for option in ordered if option is not first)]


def _distinct(ranked: Sequence[Option], chosen: Option, count: int) -> list[Option]:
    """Return the best of each combination of degrees, so that runners-up differ in more than a detail."""

    def key(option: Option) -> tuple:
        layout = option.layout
        return layout.replicate > 1, layout.tensor, layout.pipeline, layout.context, layout.checkpointing

    best: dict[tuple, Option] = {}
    for option in ranked:
        if key(option) != key(chosen):
            best.setdefault(key(option), option)
    return list(best.values())[:count]


def predict(work: Workload, option: Option) -> ClusterPrediction:
    """Return speed, time, energy and price of a run with a layout."""
    config, shape = work.config, work.shape
    tokens_per_s = work.tokens_per_step / option.step_s
    seconds = work.tokens / tokens_per_s
    peak = work.gpu.peak_bf16 * config.gpus
    causal = shape.train_flops_per_token(work.seq_len)
    again = recomputed_flops_per_token(shape, work.seq_len, option.layout.checkpointing)
    gpu_hours = seconds / 3600 * config.gpus
    watts = work.gpu.watts * (1 + config.host_share) * config.pue
    energy_kwh = watts * seconds * config.gpus / JOULES_PER_KWH
    return ClusterPrediction(
        step_s=option.step_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / config.gpus,
        mfu=tokens_per_s * shape.train_flops_per_token(work.seq_len, causal=False) / peak,
        mfu_causal=tokens_per_s * causal / peak,
        hfu=tokens_per_s * (causal + again) / peak,
        days=seconds / 86400,
        gpu_hours=gpu_hours,
        energy_kwh=energy_kwh,
        co2_kg=energy_kwh * config.co2_g_per_kwh / 1000 if config.co2_g_per_kwh else None,
        cost=gpu_hours * config.price_per_gpu_hour if config.price_per_gpu_hour else None,
        loss_nats=BESIROGLU.loss(shape.num_params, work.tokens),
    )


def recomputed_flops_per_token(shape: ModelShape, seq_len: int, checkpointing: str) -> float:
    """Return the operations that the backward pass does again."""
    linear = 2.0 * shape.layer_matrix_params * shape.decoder.num_layers
    attention = float(shape.attention_flops_per_token(seq_len))
    return {"none": 0.0, "selective": attention, "alternate": 0.5 * linear, "block": linear + attention}[checkpointing]


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive integer in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _nothing_fits(work: Workload, options: Sequence[Option]) -> str:
    least = min(options, key=lambda option: option.memory.used)
    return (
        f"{work.shape.name} does not fit on gpus={work.config.gpus} of {work.gpu.label}: the leanest layout ({least.layout}) needs "
        f"{least.memory.used / 1e9:.1f} GB, and memory_margin={work.config.memory_margin:g} leaves {work.usable_bytes / 1e9:.1f} GB. "
        "Use more accelerators, a larger one, or a shorter seq_len."
    )
