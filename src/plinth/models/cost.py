"""What a decoder costs: parameters, floating-point operations and bytes, as exact integers worked out from its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plinth.models.config import DecoderConfig
from plinth.ops.loss import CHUNK_ELEMENTS

MAX_MUON_SHARE = 0.47  # the highest share at which docs/ablations.md has compared Muon with AdamW, in equal time; Muon won there


def _num_expert_layers(config: DecoderConfig) -> int:
    return sum(config.has_experts(i) for i in range(config.num_layers))


def _matrix_params(config: DecoderConfig, experts: int | None = None) -> int:
    """Parameters of the blocks' matrices: fused qkv, attention output, gate (where there is one), up and down.

    Of a mixture of experts: the shared one, and all of the others or so many of them.
    """
    heads, routed = config.num_heads + 2 * config.num_kv_heads, _num_expert_layers(config)
    attention = config.num_layers * config.head_dim * (heads + config.num_heads)
    count = config.num_experts if experts is None else experts
    widths = (config.num_layers - routed) * config.intermediate_size
    widths += routed * (config.shared_expert_intermediate_size + (count * config.expert_size if routed else 0))
    return config.hidden_size * (attention + config.num_mlp_matrices * widths)


def _router_params(config: DecoderConfig) -> int:
    """Parameters of all routers and of the gates of shared experts."""
    return _num_expert_layers(config) * config.hidden_size * (config.num_experts + config.shared_expert_gate)


def _layer_bias_params(config: DecoderConfig) -> int:
    """Parameters of one block's biases."""
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.qkv_bias
    up = (config.num_mlp_matrices - 1) * config.intermediate_size * config.mlp_bias
    return qkv + up + config.hidden_size * (config.out_bias + config.mlp_bias)


def _norm_params(config: DecoderConfig) -> int:
    """Parameters of all normalisations: two a block, as many more with post-norms, those of heads, and the last one."""
    if not config.learnable_norm:
        return 0
    layer = 2 * config.hidden_size * (1 + config.post_norms) + 2 * config.head_dim * config.qk_norm
    return (config.num_layers * layer + config.hidden_size) * (2 if config.norm == "layer" else 1)


def _value_gate_params(config: DecoderConfig) -> int:
    """Parameters of the gates of all value embeddings."""
    return config.num_value_embeddings * config.value_gate_channels * config.num_kv_heads


def count_params(config: DecoderConfig) -> dict[str, int]:
    """Return {total, embedding, non_embedding, matrix}.

    `embedding` is the token matrix, the head's where that is one of its own, and the tables of learnt places and of value embeddings.
    `matrix` is the blocks' matrices (what Muon trains).
    """
    matrix = _matrix_params(config)
    scalars = 2 * config.num_layers * config.residual_scalars
    body = matrix + config.num_layers * _layer_bias_params(config) + _norm_params(config) + scalars + _value_gate_params(config)
    body += _router_params(config)
    tables = config.num_value_embeddings * config.kv_dim
    embedding = config.vocab_size * (config.hidden_size * (1 if config.tie_embeddings else 2) + tables)
    if config.position == "learned":
        embedding += config.max_seq_len * config.hidden_size
    return {"total": body + embedding, "embedding": embedding, "non_embedding": body, "matrix": matrix}


def count_active_params(config: DecoderConfig) -> int:
    """Return the parameters that a token uses: all but the experts that it does not take. Embedding and head count whole."""
    return count_params(config)["total"] - _matrix_params(config) + _matrix_params(config, config.num_active_experts)


def forward_flops_per_token(config: DecoderConfig, seq_len: int, *, causal: bool = True) -> int:
    """Return the operations of a forward pass a token, averaged over a sequence of `seq_len` tokens, the head included.

    A multiply-add counts as 2. Matrices: 2 (block matrices + gates of value embeddings + V D), of experts those that a token takes, and the
    routers. Attention: scores and weighted values are 4 H E a layer and attended position; a token attends to (seq_len + 1) / 2 positions
    on average, in blocks with a sliding window to no more than it shows, or to all with causal=False (the convention of PaLM, and what
    profilers count). Norms, rotary embedding, softmax and lookups are left out: they are no matrix products. Rounded up.
    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1; Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    head = config.vocab_size * config.hidden_size
    blocks = _matrix_params(config, config.num_active_experts) + _router_params(config)
    matrices = 2 * (blocks + _value_gate_params(config) + head)
    pairs = sum(_attended_pairs(config, i, seq_len) if causal else seq_len**2 for i in range(config.num_layers))
    return matrices - (-4 * config.num_heads * config.head_dim * pairs // seq_len)


def _attended_pairs(config: DecoderConfig, layer: int, seq_len: int) -> int:
    """Return how many pairs of a token and one that it attends to a sequence has in a block."""
    window = min(config.sliding_window or seq_len, seq_len) if config.slides(layer) else seq_len
    return window * (window + 1) // 2 + (seq_len - window) * window


def train_flops_per_token(config: DecoderConfig, seq_len: int, *, causal: bool = True) -> int:
    """Return the operations of a training step a token: forward, and twice that backward; nothing is recomputed."""
    return 3 * forward_flops_per_token(config, seq_len, causal=causal)


def muon_cost_share(hidden_size: int, tokens_per_step: int) -> float:
    """Return what Muon's orthogonalisation costs as a share of a step: about 5 width / tokens.

    Five Newton-Schulz iterations on a square matrix take some 30 d^3 FLOPs, the step itself 6 d^2 a token.
    """
    return 5.0 * hidden_size / tokens_per_step


def optimizer_by_cost(hidden_size: int, tokens_per_step: int) -> Literal["muon", "adamw"]:
    """Return the optimizer where none is named: muon up to the share of a step at which it was seen to win, else adamw."""
    return "muon" if muon_cost_share(hidden_size, tokens_per_step) <= MAX_MUON_SHARE else "adamw"


def least_tokens_for_muon(hidden_size: int) -> float:
    """Return the smallest batch, in tokens, at which `optimizer_by_cost` takes muon."""
    return muon_cost_share(hidden_size, 1) / MAX_MUON_SHARE


def kv_bytes_per_token(config: DecoderConfig, dtype_bytes: int = 4) -> int:
    """Return the bytes of cached keys and values a position, all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype_bytes


def decode_bytes_per_token(
    config: DecoderConfig, context_tokens: int, *, batch_size: int = 1, weight_bytes: int = 4, cache_bytes: int = 4
) -> int:
    """Return the bytes read from memory for one generated token of each of `batch_size` sequences, rounded up.

    Every weight once a step, shared by the batch (of a separate embedding matrix and of value embeddings one row a sequence; of experts
    as many as the batch takes at most), and the keys and values of `context_tokens` positions. At small batches this, over the memory's
    bandwidth, is the least time of a token.
    """
    unread = _matrix_params(config) - _matrix_params(config, min(config.num_experts, batch_size * config.num_active_experts))
    head = config.vocab_size * config.hidden_size
    step = (count_params(config)["non_embedding"] - unread + head) * weight_bytes
    rows = (0 if config.tie_embeddings else config.hidden_size) + config.num_value_embeddings * config.kv_dim
    return -(-step // batch_size) + rows * weight_bytes + context_tokens * kv_bytes_per_token(config, cache_bytes)


@dataclass(frozen=True)
class TrainMemory:
    """Bytes held at the peak of a training step."""

    weights: int
    """fp32 weights, and a copy of them in the compute type where that is narrower"""
    gradients: int
    """gradients, in the compute type"""
    optimizer: int
    """optimizer state, fp32"""
    activations: int
    """what the forward pass keeps for the backward pass"""
    head: int
    """gradients of the head and of the last hidden states, and the logits that exist at once"""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def train_memory_bytes(
    config: DecoderConfig,
    micro_batch_size: int,
    seq_len: int,
    *,
    compute_bytes: int = 4,
    head_tokens: int | None = None,
    muon: bool = False,
    own_kernels: bool = False,
) -> TrainMemory:
    """Return the memory of a training step of `micro_batch_size` sequences, without the allocator's slack and the interpreter.

    `compute_bytes` is 2 for bf16, 4 for fp32. `head_tokens` is how many tokens' logits exist at once; None takes what the loss takes.
    AdamW keeps two fp32 values a parameter, Muon one for the blocks' matrices. `own_kernels`: see activation_bytes_per_token.
    """
    counts = count_params(config)
    tokens = micro_batch_size * seq_len
    copy_bytes = 0 if compute_bytes == 4 else compute_bytes
    logits = min(tokens, head_tokens or max(1, CHUNK_ELEMENTS // config.vocab_size)) * config.vocab_size
    head_weight = config.vocab_size * config.hidden_size
    return TrainMemory(
        weights=counts["total"] * (4 + copy_bytes),
        gradients=counts["total"] * compute_bytes,
        optimizer=(2 * counts["total"] - (counts["matrix"] if muon else 0)) * 4,
        activations=tokens * activation_bytes_per_token(config, seq_len, compute_bytes, own_kernels=own_kernels),
        head=tokens * config.hidden_size * compute_bytes + head_weight * (4 + copy_bytes) + logits * (8 + copy_bytes),
    )


def activation_bytes_per_token(config: DecoderConfig, seq_len: int, compute_bytes: int = 4, *, own_kernels: bool = False) -> int:
    """Return the bytes a token that the blocks' fused operations on a CPU keep for the backward pass.

    A norm keeps its output and a scale; attention the normalised and the rotated heads, the values, the repeated keys where heads are
    grouped, its output, and a row of probabilities a head; SwiGLU gate, up, silu(gate) and their product; squared ReLU relu(up)
    and its square; residual scalars the sum before each block and the normalised embedding; a value embedding its row, its gate and the
    gate's tanh. Exact for a decoder without learnt norm scales; learnt ones take the plain operations, whose norms keep fp32 copies
    besides, but no probabilities; other kinds of norm, position and scores are estimated as if they were the default's.
    With `own_kernels` (plinth.ops.kernels, bf16 only) attention keeps its input, its output and a number a head, and SwiGLU its input
    and its output.
    """
    if own_kernels:
        return _activation_bytes_with_kernels(config)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    grouped = heads != kv_heads
    head_vectors = 2 * (heads + kv_heads) + heads + (2 * heads if grouped else kv_heads)
    attention = head_vectors * config.head_dim + (heads + kv_heads) + heads * seq_len
    norm = config.hidden_size + 1
    layers = config.num_layers * (_norms_a_layer(config) * norm + attention) + _kept_by_feed_forward(config, 4 if config.is_gated else 2)
    return (layers + norm + _kept_by_extras(config) + config.residual_scalars) * compute_bytes


def _kept_by_feed_forward(config: DecoderConfig, width: int) -> int:
    """Elements a token that all feed-forward layers keep between their matrices, `width` a unit; of experts also the sorted rows.

    What the router and the gate of a shared expert keep of their scores is left out.
    """
    routed = _num_expert_layers(config)
    experts = config.num_active_experts * (2 * config.hidden_size + width * config.expert_size) if routed else 0
    shared = width * config.shared_expert_intermediate_size + config.hidden_size * config.shared_expert_gate
    return (config.num_layers - routed) * width * config.intermediate_size + routed * (experts + shared)


def _kept_by_extras(config: DecoderConfig) -> int:
    """Elements a token that residual scalars and value embeddings keep, but for the scale of the embedding's norm."""
    mixed = (config.num_layers + 1) * config.hidden_size * config.residual_scalars
    return mixed + config.num_value_embeddings * (config.kv_dim + 2 * config.num_kv_heads)


def _activation_bytes_with_kernels(config: DecoderConfig) -> int:
    heads = config.num_heads + 2 * config.num_kv_heads
    norm = 2 * config.hidden_size + 4
    attention = 2 * (heads + config.num_heads) * config.head_dim + 4 * config.num_heads
    feed_forward = 2 * _kept_by_feed_forward(config, config.num_mlp_matrices)
    extras = 2 * _kept_by_extras(config) + 4 * config.residual_scalars
    return config.num_layers * (_norms_a_layer(config) * norm + attention) + feed_forward + norm + extras


def _norms_a_layer(config: DecoderConfig) -> int:
    """How many times a block normalises the whole width."""
    return 4 if config.post_norms else 2
