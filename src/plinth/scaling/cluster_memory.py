"""Memory of one accelerator in a training step, item by item, from a model's shape and a layout.

Activations: Korthikanti et al. 2022, arXiv:2205.05198, counted again for attention that keeps no probabilities, grouped heads and SwiGLU.
Sharded state: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from plinth.ops.chunked_loss import chunk_rows
from plinth.scaling.cluster_config import Layout
from plinth.scaling.known_models import ModelShape

MASTER = 4  # bytes of an fp32 value: weights that the optimizer updates, its moments, reduced gradients
COMPUTE = 2  # bytes of a bf16 value: gathered parameters, activations
FULL_LOGIT = 12  # bytes of a logit: bf16 and an fp32 copy, and the gradient of each
CHUNK_LOGIT = 4  # the same in Plinth's loss: bf16 and its gradient


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on the accelerator that holds most, at the peak of a step."""

    parameters: int
    """this rank's share of the fp32 parameters, and a bf16 copy where parameters stay gathered"""
    gradients: int
    """fp32 gradients: this rank's share, or those of its whole stage where they are accumulated unsharded"""
    optimizer: int
    """optimizer state, fp32"""
    activations: int
    """what the forward passes in flight keep for their backward passes"""
    logits: int
    """logits of a micro-batch with their gradient, or of one chunk of it"""
    buffers: int
    """parameters of two layers, embedding and head gathered in bf16, and the gradients of the largest of them before they are reduced"""
    margin: int
    """kept free against fragmentation"""

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return self.used + self.margin

    @property
    def used(self) -> int:
        """Bytes of all items but the margin: what an allocator would report."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


def layers_a_stage(shape: ModelShape, layout: Layout) -> int:
    """Return the layers of the stage that has most."""
    return math.ceil(shape.decoder.num_layers / layout.pipeline)


def local_params(shape: ModelShape, layout: Layout) -> float:
    """Return the parameters of the largest stage on one tensor-parallel rank, before sharding: layers, with embedding or head."""
    ends = shape.head_params * (1 if shape.decoder.tie_embeddings or layout.pipeline > 1 else 2)
    body = shape.num_params - shape.head_params * (1 if shape.decoder.tie_embeddings else 2)
    return (body / shape.decoder.num_layers * layers_a_stage(shape, layout) + ends) / layout.tensor


def activation_bytes_per_token(shape: ModelShape, layout: Layout, checkpointing: str | None = None) -> float:
    """Return the bf16 bytes that one block keeps a token on one rank for the backward pass, with the layout's checkpointing or another.

    none: the inputs of both norms and of the products behind them (8 D), queries, keys, values and attention's output with an fp32
    scale a head (4 H E + 4 K E + 4 H; 2 H E + 2 K E more where queries and keys are normalised), and the feed-forward layer's hidden
    values (6 F with a gate, 4 F without). For D = H E, K = H / 4 and F = 3.5 D that is the 34 D of Korthikanti et al. 2022, eq. 2
    without its quadratic term. selective: the block's input and the products' outputs. alternate: the input, attention's output and
    half of the products' outputs. block: the input.
    Tensor parallelism divides what lies between its products, and the rest too with sequence parallelism (their eq. 4).
    """
    decoder = shape.decoder
    width, feed_forward = decoder.hidden_size, decoder.intermediate_size
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    up = 2 if shape.gated else 1
    normed = 0 if shape.qk_norm == "none" else heads + kv_heads
    scales = 4 * decoder.num_heads
    products = heads + 2 * kv_heads + up * feed_forward
    whole, cut = {
        "none": (4 * width, COMPUTE * (2 * heads + 2 * kv_heads + normed + (up + 1) * feed_forward) + scales),
        "selective": (3 * width, COMPUTE * products),
        "alternate": (2 * width, COMPUTE * (heads + products / 2) + scales),
        "block": (width, 0),
    }[checkpointing or layout.checkpointing]
    return COMPUTE * whole / (layout.tensor if layout.sequence_parallel else 1) + cut / layout.tensor


def gpu_memory(
    shape: ModelShape,
    layout: Layout,
    seq_len: int,
    micro_batches: int,
    *,
    optimizer: str = "adamw",
    chunked_loss: bool = True,
    margin: int = 0,
) -> GpuMemory:
    """Return the memory of the fullest accelerator; `micro_batches` are those of one data-parallel rank a step, `margin` is kept free."""
    local = local_params(shape, layout)
    kept = not layout.reshard or layout.state_ranks == 1
    accumulated = layout.state_ranks == 1 or (not layout.reduce_each and micro_batches > 1)
    moments = 2.0
    if optimizer == "muon":
        matrix = shape.layer_matrix_params * layers_a_stage(shape, layout) / layout.tensor
        moments -= matrix / local
    items = {
        "parameters": MASTER * local / layout.state_ranks + (COMPUTE * local if kept else 0),
        "gradients": MASTER * local / (1 if accumulated else layout.state_ranks),
        "optimizer": moments * MASTER * local / layout.state_ranks,
        "activations": _activations(shape, layout, seq_len, micro_batches),
        "logits": _logits(shape, layout, seq_len, chunked_loss),
        "buffers": _buffers(shape, layout, kept, accumulated),
    }
    rounded = {name: math.ceil(value) for name, value in items.items()}
    return GpuMemory(**rounded, margin=margin)


def in_flight(layout: Layout, micro_batches: int) -> float:
    """Return how many micro-batches' activations the first stage holds at once.

    One without a pipeline; as many as there are stages with the schedule of one forward, one backward; with v interleaved chunks
    1 + (p - 1) / (p v) times that. Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3.
    """
    stages = layout.pipeline
    held = float(min(stages, micro_batches))
    if stages > 1 and layout.virtual_stages > 1:
        held = min(held * (1 + (stages - 1) / (stages * layout.virtual_stages)), float(micro_batches))
    return held


def _activations(shape: ModelShape, layout: Layout, seq_len: int, micro_batches: int) -> float:
    tokens = layout.micro_batch_size * seq_len / layout.context
    layer = tokens * activation_bytes_per_token(shape, layout)
    working = 0.0 if layout.checkpointing == "none" else tokens * activation_bytes_per_token(shape, layout, "none")
    working += COMPUTE * tokens * (3 if shape.gated else 2) * shape.decoder.intermediate_size / layout.tensor  # gradients within a block
    whole = 2 * COMPUTE * tokens * shape.decoder.hidden_size  # a tensor-parallel rank's gathered input and its gradient; or the head's
    return layer * layers_a_stage(shape, layout) * in_flight(layout, micro_batches) + working + whole


def _logits(shape: ModelShape, layout: Layout, seq_len: int, chunked: bool) -> float:
    vocab = shape.decoder.vocab_size / layout.tensor
    tokens = layout.micro_batch_size * seq_len / layout.context
    if chunked:
        return CHUNK_LOGIT * vocab * chunk_rows(math.ceil(tokens), math.ceil(vocab))
    return FULL_LOGIT * tokens * vocab


def _buffers(shape: ModelShape, layout: Layout, kept: bool, accumulated: bool) -> float:
    layer = shape.layer_matrix_params / layout.tensor
    head = shape.head_params / layout.tensor
    ends = head * (1 if shape.decoder.tie_embeddings or layout.pipeline > 1 else 2)
    gathered = 0.0 if kept else COMPUTE * (2 * layer + ends)
    reduced = 0.0 if accumulated else (COMPUTE + MASTER) * max(layer, head)
    return gathered + reduced
