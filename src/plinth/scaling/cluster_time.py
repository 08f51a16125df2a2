"""Time of a training step on a cluster: products, memory passes, transfers over each kind of link, and what of them overlaps.

The constants below are one set for every model, accelerator and layout; `published.py` holds the runs that they are checked against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from plinth.scaling.accelerators import Accelerator
from plinth.scaling.cluster_config import Layout
from plinth.scaling.cluster_memory import COMPUTE, MASTER, layers_a_stage, local_params
from plinth.scaling.known_models import ModelShape
from plinth.scaling.timing import OPTIMIZER_BYTES_PER_PARAM, muon_flops


@dataclass(frozen=True)
class StepConstants:
    """The one set of constants. Those that say so were fitted to the calibration rows of `published.py`, together with the shares of
    `accelerators.py`; the others are from elsewhere."""

    attention_share: float = 0.6
    """rate of attention's kernel over that of large products: some 335 of 590 TFLOP/s on an H100 (FlashAttention-2, arXiv:2307.08691)"""
    memory_share: float = 0.8
    """of the memory's bandwidth that passes over activations reach; assumed"""
    link_share: float = 0.8
    """of a link's nominal rate that a large collective reaches; assumed"""
    overlap: float = 0.9
    """of the computation of a step that sharding's transfers can hide behind; assumed"""
    contention: float = 0.7
    """seconds that a hidden second of transfers costs the products that hide it, by taking their processors and bandwidth; fitted"""
    tensor_overlap: float = 0.6
    """of tensor-parallel transfers that run behind products where asynchronous tensor parallelism is on; assumed"""
    link_latency_s: float = 5.7e-6
    """a hop of a ring within a node: NCCL, src/graph/tuning.cc of 2020, hwLat, ring, simple protocol"""
    network_latency_s: float = 6.6e-6
    """a hop of a ring between nodes: the same table"""
    floor_s: float = 3e-4
    """least time of a block's forward and backward pass: some sixty kernels at 5 us; assumed"""
    fp8_cast_bytes: float = 5.0
    """bytes moved to cast one value to fp8: read for its scale, read again, written; arithmetic"""


CONSTANTS = StepConstants()


@dataclass(frozen=True)
class Transfer:
    """One kind of traffic of one accelerator in a step."""

    name: str
    """what is moved, and for which kind of parallelism"""
    operation: str
    """collective that moves it"""
    group: int
    """ranks that take part"""
    link: str
    """node or network"""
    bytes: float
    """bytes that the accelerator receives"""
    seconds: float
    """time at the rate that the link reaches, latency included"""
    exposed_s: float
    """what of it no computation hides"""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the accelerator that finishes last, and what they go into."""

    products_s: float
    """matrix products and attention, nothing recomputed"""
    recomputed_s: float
    """products of the forward pass done again in the backward pass"""
    passes_s: float
    """norms, activations, residuals: bounded by memory bandwidth"""
    optimizer_s: float
    """update of this rank's share of the parameters"""
    bubble_s: float
    """waiting for the pipeline to fill and empty"""
    transfers: tuple[Transfer, ...]
    """traffic"""

    @property
    def exposed_s(self) -> float:
        """Seconds of transfers that nothing hides."""
        return sum(each.exposed_s for each in self.transfers)

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return self.products_s + self.recomputed_s + self.passes_s + self.optimizer_s + self.bubble_s + self.exposed_s


@dataclass(frozen=True)
class Links:
    """Rates of collectives between an accelerator and the others of a group."""

    gpu: Accelerator
    """whose links they are"""
    gpus_per_node: int
    """accelerators of a node"""
    constants: StepConstants = CONSTANTS
    """what of their nominal rates is reached, and how much of their traffic is hidden"""

    def ring(self, layout: Layout, dimension: str, received_bytes: float, *, calls: float = 1.0) -> tuple[float, str]:
        """Return (seconds, link) of `calls` ring collectives in which each rank receives `received_bytes` in all.

        k ranks of a group on one node drive k network cards at once, so that the slowest hop carries k cards' rate, at most the node's.
        """
        size, on_node = layout.group_on_node(dimension, self.gpus_per_node)
        nodes = -(-size // on_node)
        rate = self.constants.link_share * self.gpu.link_bandwidth
        if nodes > 1:
            rate = min(rate, self.constants.link_share * self.gpu.network_bandwidth * on_node)
        hops_s = (nodes - 1) * self.constants.network_latency_s + (size - nodes) * self.constants.link_latency_s
        return received_bytes / rate + calls * hops_s, "network" if nodes > 1 else "node"


@dataclass(frozen=True)
class StageWork:
    """Seconds of one micro-batch on the slowest stage."""

    forward_s: float
    """products and attention of the forward pass"""
    recomputed_s: float
    """products done again"""
    passes_s: float
    """memory passes, forward and backward"""
    attention_s: float
    """attention's part of forward and backward, behind which a ring of keys and values can run"""

    @property
    def products_s(self) -> float:
        """Products and attention, forward and backward."""
        return 3 * self.forward_s

    @property
    def total_s(self) -> float:
        """Everything that an accelerator computes for the micro-batch."""
        return self.products_s + self.recomputed_s + self.passes_s


def stage_work(
    shape: ModelShape, layout: Layout, gpu: Accelerator, seq_len: int, dtype: str, constants: StepConstants = CONSTANTS
) -> StageWork:
    """Return what a micro-batch takes on the slowest stage, without transfers.

    With a pipeline, layers are dealt so that head and embedding take the place of some; the slowest stage has the larger of its share of
    the whole and a whole number of layers.
    """
    decoder = shape.decoder
    tokens = layout.micro_batch_size * seq_len / layout.context / layout.tensor
    large, wide = gpu.matmul_rate(dtype), gpu.matmul_rate("bf16")
    linear_s = tokens * 2 * shape.layer_matrix_params / large
    attention_s = tokens * shape.attention_flops_per_token(seq_len) / decoder.num_layers / (wide * constants.attention_share)
    head_s = tokens * 2 * shape.head_params / wide
    cast_bytes = cast_values_per_token(shape) * constants.fp8_cast_bytes if dtype == "fp8" else 0.0
    passes_s = tokens * (pass_bytes_per_token(shape, layout) + cast_bytes) / (gpu.memory_bandwidth * constants.memory_share)
    again = {"none": 0.0, "selective": attention_s, "alternate": 0.5 * linear_s, "block": linear_s + attention_s}[layout.checkpointing]
    layer = StageWork(linear_s + attention_s, again, passes_s, 3 * attention_s)
    slow = max(1.0, constants.floor_s / layer.total_s)
    layers = layers_a_stage(shape, layout)
    all_s = decoder.num_layers * slow * layer.total_s + 3 * head_s
    widest = max(layers * slow * layer.total_s, all_s / layout.pipeline)
    scale = widest / (layers * layer.total_s + (3 * head_s if layout.pipeline == 1 else 0.0))
    ends = head_s if layout.pipeline == 1 else 0.0
    return StageWork(
        scale * (layers * layer.forward_s + ends),
        scale * layers * layer.recomputed_s,
        scale * layers * layer.passes_s,
        scale * layers * layer.attention_s,
    )


def pass_bytes_per_token(shape: ModelShape, layout: Layout) -> float:
    """Return the bf16 bytes that a block's norms, residuals, rotation and activation read and write a token, backward counted twice.

    Forward: two norms with the residual added (9 D, on every tensor-parallel rank without sequence parallelism), queries and keys rotated
    (2 H E + 2 K E, twice that where they are normalised too), and the activation (3 F with a gate, 2 F without). Recomputing adds another
    forward pass. The caller divides by the tensor-parallel ranks.
    """
    decoder = shape.decoder
    heads = (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim
    rotated = 2 * heads * (1 if shape.qk_norm == "none" else 2)
    residual = 9 * decoder.hidden_size * (1 if layout.sequence_parallel else layout.tensor)
    forward = residual + rotated + (3 if shape.gated else 2) * decoder.intermediate_size
    return COMPUTE * forward * (3 if layout.checkpointing == "none" else 4)


def cast_values_per_token(shape: ModelShape) -> int:
    """Return the values a token and block that fp8 products have cast: inputs of the products, gradients of their outputs."""
    decoder = shape.decoder
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    inputs = 2 * decoder.hidden_size + heads + decoder.intermediate_size
    outputs = heads + 2 * kv_heads + 2 * decoder.hidden_size + (2 if shape.gated else 1) * decoder.intermediate_size
    return inputs + outputs


def step_time(
    shape: ModelShape,
    layout: Layout,
    gpu: Accelerator,
    seq_len: int,
    micro_batches: int,
    *,
    gpus_per_node: int = 8,
    dtype: str = "bf16",
    optimizer: str = "adamw",
    constants: StepConstants = CONSTANTS,
) -> StepTime:
    """Return the seconds of a step of `micro_batches` micro-batches a data-parallel rank."""
    links = Links(gpu, gpus_per_node, constants)
    work = stage_work(shape, layout, gpu, seq_len, dtype, constants)
    inner = [*_tensor_transfers(shape, layout, links, seq_len), *_context_transfers(shape, layout, links, seq_len, work)]
    micro_s = work.total_s + sum(each.exposed_s for each in inner)
    transfers = [_times(each, micro_batches) for each in inner]
    transfers += _pipeline_transfers(layout, links, shape, seq_len, micro_batches, micro_s)
    transfers += _sharding_transfers(shape, layout, links, micro_batches, work)
    bubble = (layout.pipeline - 1) / layout.virtual_stages * micro_s
    return StepTime(
        products_s=micro_batches * work.products_s,
        recomputed_s=micro_batches * work.recomputed_s,
        passes_s=micro_batches * work.passes_s,
        optimizer_s=_optimizer_s(shape, layout, gpu, optimizer, constants),
        bubble_s=bubble,
        transfers=tuple(transfers),
    )


def _times(transfer: Transfer, count: int) -> Transfer:
    return replace(transfer, bytes=transfer.bytes * count, seconds=transfer.seconds * count, exposed_s=transfer.exposed_s * count)


def _tensor_transfers(shape: ModelShape, layout: Layout, links: Links, seq_len: int) -> list[Transfer]:
    """Two gathers and two reduce-scatters of the activations a block forward, as many backward, and the forward ones again if recomputed.

    Without sequence parallelism they are two all-reduces, of the same bytes.
    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2. Its further gather for the weights' gradient runs behind a product.
    """
    size = layout.tensor
    if size == 1:
        return []
    calls = (12 if layout.checkpointing == "block" else 8) * layers_a_stage(shape, layout)
    tokens = layout.micro_batch_size * seq_len / layout.context
    moved = calls * COMPUTE * tokens * shape.decoder.hidden_size * (size - 1) / size
    seconds, link = links.ring(layout, "tensor", moved, calls=calls)
    operation = "all-gather, reduce-scatter" if layout.sequence_parallel else "all-reduce"
    exposed = seconds * (1 - links.constants.tensor_overlap) if layout.overlap_tensor else seconds
    return [Transfer("TP activations", operation, size, link, moved, seconds, exposed)]


def _context_transfers(shape: ModelShape, layout: Layout, links: Links, seq_len: int, work: StageWork) -> list[Transfer]:
    """Keys and values of all other ranks of the ring once forward, and twice as much backward; behind attention as far as it lasts.

    Source: Liu et al. 2023, arXiv:2310.01889.
    """
    size = layout.context
    if size == 1:
        return []
    kv_values = 2 * shape.decoder.num_kv_heads * shape.decoder.head_dim / layout.tensor
    layers = layers_a_stage(shape, layout)
    passes = 4 if layout.checkpointing == "block" else 3
    moved = passes * layers * COMPUTE * layout.micro_batch_size * seq_len * kv_values * (size - 1) / size
    seconds, link = links.ring(layout, "context", moved, calls=passes * layers)
    exposed = max(0.0, seconds - links.constants.overlap * work.attention_s)
    return [Transfer("CP keys and values", "ring", size, link, moved, seconds, exposed)]


def _pipeline_transfers(
    layout: Layout, links: Links, shape: ModelShape, seq_len: int, micro_batches: int, micro_s: float
) -> list[Transfer]:
    """The block's input to the next stage and its gradient back, for every chunk of layers."""
    if layout.pipeline == 1:
        return []
    tokens = layout.micro_batch_size * seq_len / layout.context / (layout.tensor if layout.sequence_parallel else 1)
    sends = 2 * layout.virtual_stages * micro_batches
    moved = sends * COMPUTE * tokens * shape.decoder.hidden_size
    seconds, link = links.ring(layout, "next stage", moved, calls=sends)
    hidden = links.constants.overlap * micro_batches * micro_s
    return [Transfer("PP activations", "send", layout.pipeline, link, moved, seconds, max(0.0, seconds - hidden))]


def _sharding_transfers(shape: ModelShape, layout: Layout, links: Links, micro_batches: int, work: StageWork) -> list[Transfer]:
    """Gathers of bf16 parameters and reduce-scatters of fp32 gradients among the ranks that share the state, all-reduces between copies.

    Freed after use, parameters are gathered for each forward and each backward pass; kept, once a step. A gather hides behind a forward
    pass, a third of a micro-batch's computation; a backward pass hides its gather and the reduction of gradients.
    """
    local, layers = local_params(shape, layout), layers_a_stage(shape, layout)
    size, constants = layout.state_ranks, links.constants
    forward_s, backward_s = work.total_s / 3, work.total_s * 2 / 3
    found = []
    if size > 1:
        share = (size - 1) / size
        gather_s, link = links.ring(layout, "state", COMPUTE * local * share, calls=layers)
        reduce_s, _ = links.ring(layout, "state", MASTER * local * share, calls=layers)
        again = layout.reshard
        gathers = 2 * micro_batches if again else 1
        reductions = micro_batches if layout.reduce_each else 1
        first = _exposed(gather_s, gather_s / layers, forward_s, constants)
        plain = _exposed(gather_s, gather_s / layers, backward_s, constants) if again else 0.0
        both_s = reduce_s + (gather_s if again else 0.0)
        last = _exposed(both_s, both_s / layers, backward_s, constants)
        exposed = (micro_batches if again else 1) * first + reductions * last + (micro_batches - reductions) * plain
        moved_s = gathers * gather_s + reductions * reduce_s
        for name, operation, count, bytes_each, seconds in (
            ("FSDP parameters", "all-gather", gathers, COMPUTE * local * share, gather_s),
            ("FSDP gradients", "reduce-scatter", reductions, MASTER * local * share, reduce_s),
        ):
            found.append(Transfer(name, operation, size, link, count * bytes_each, count * seconds, exposed * count * seconds / moved_s))
    if layout.replicate > 1:
        moved = 2 * MASTER * local / size * (layout.replicate - 1) / layout.replicate
        seconds, link = links.ring(layout, "replicate", moved, calls=2 * layers)
        exposed = _exposed(seconds, seconds / layers, backward_s, constants)
        found.append(Transfer("HSDP gradients", "all-reduce", layout.replicate, link, moved, seconds, exposed))
    return found


def _exposed(seconds: float, ends_s: float, window_s: float, constants: StepConstants) -> float:
    """Return what a transfer adds to a step: what does not fit behind `window_s` of computation or has none, and a share of what does."""
    open_s = max(ends_s, seconds - constants.overlap * window_s)
    return open_s + constants.contention * (seconds - open_s)


def _optimizer_s(shape: ModelShape, layout: Layout, gpu: Accelerator, optimizer: str, constants: StepConstants) -> float:
    """Return the seconds of passing over this rank's state, and of Muon's products, divided over the ranks of the shard group."""
    local = local_params(shape, layout)
    seconds = OPTIMIZER_BYTES_PER_PARAM * local / layout.state_ranks / (gpu.memory_bandwidth * constants.memory_share)
    if optimizer == "muon":
        seconds += muon_flops(shape.decoder) / (layout.state_ranks * layout.tensor * layout.pipeline) / gpu.matmul_rate("bf16")
    return seconds
