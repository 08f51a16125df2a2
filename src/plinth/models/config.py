"""What a decoder is: its shape, in Hugging Face's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from plinth.config import UserError

MULTIPLIERS = ("output_multiplier", "attention_multiplier")
EXTRAS = ("logit_softcap", "activation", "residual_scalars", "value_embeddings")  # options that Qwen3's format does not hold ...
FAMILY = (  # ... and those by which the published families differ
    "norm", "norm_offset", "post_norms", "qk_norm", "qkv_bias", "out_bias", "mlp_bias", "position", "rope_scaling", "sliding_window",
    "window_layers", "local_rope_theta", "attention_softcap", "query_scale", "embed_multiplier", "num_experts", "num_active_experts",
    "expert_intermediate_size", "shared_expert_intermediate_size", "shared_expert_gate", "norm_topk_prob", "dense_layers",
)  # fmt: skip
GATED = ("swiglu", "geglu")
ACTIVATIONS = ("swiglu", "relu2", "geglu", "gelu", "gelu_tanh")
VALUE_GATE_CHANNELS = 12
ROPE_KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for texts longer than those of a first training.

    Sources: linear, Chen et al. 2023, arXiv:2306.15595; yarn, Peng et al. 2023, arXiv:2309.00071; llama3, the released Llama 3.1.
    """

    kind: Literal["linear", "llama3", "yarn"]
    """linear divides all frequencies by the factor; llama3 and yarn the low ones, in part those between"""
    factor: float
    """by how much low frequencies are divided"""
    original_max_seq_len: int | None = None
    """longest sequence of the first training in tokens (llama3, yarn)"""
    low_freq_factor: float = 1.0
    """turns over the original length below which a frequency is divided whole (llama3)"""
    high_freq_factor: float = 4.0
    """turns over the original length above which a frequency stays (llama3)"""
    beta_fast: float = 32.0
    """turns over the original length above which a frequency stays (yarn)"""
    beta_slow: float = 1.0
    """turns over the original length below which a frequency is divided whole (yarn)"""
    attention_factor: float | None = None
    """factor on the rotated queries and keys (yarn; default: 0.1 ln(factor) + 1)"""
    truncate: bool = True
    """round the bounds between which frequencies are divided in part to whole ones (yarn)"""

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UserError(f"rope_scaling.kind={self.kind!r} is unknown. Use one of {', '.join(ROPE_KINDS)}.")
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor={self.factor} must be at least 1. Leave rope_scaling out for frequencies as they are.")
        if self.kind != "linear" and (self.original_max_seq_len is None or self.original_max_seq_len < 1):
            raise UserError(
                f"rope_scaling.kind={self.kind} needs original_max_seq_len, a length in tokens; it is {self.original_max_seq_len}."
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be above 0 and below high_freq_factor={self.high_freq_factor}."
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise UserError(f"rope_scaling.beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast}.")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder; by default Qwen3's shape (RMSNorm, RoPE, SwiGLU, QK-norm, grouped-query attention)."""

    vocab_size: int = 4096
    """number of token ids"""
    hidden_size: int = 256
    """width of the residual stream"""
    num_layers: int = 6
    """number of blocks"""
    num_heads: int = 4
    """query heads a block"""
    num_kv_heads: int = 4
    """key and value heads a block; divides num_heads"""
    head_dim: int = 64
    """width of a head; even"""
    intermediate_size: int = 768
    """width of the feed-forward layer"""
    max_seq_len: int = 512
    """longest sequence in tokens"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""
    norm_eps: float = 1e-6
    """added to the mean square before the root"""
    tie_embeddings: bool = True
    """use the embedding matrix as output head"""
    learnable_norm: bool = False
    """train the scales of the normalisations; without it they are 1 (and are exported as 1)"""
    output_multiplier: float = 1.0
    """factor on the last hidden states, before the head; folded into the weights at export"""
    attention_multiplier: float = 1.0
    """factor on attention's 1/sqrt(head_dim); folded into the scale of the queries' norm at export"""
    logit_softcap: float | None = None
    """bound of the logits, as cap * tanh(logits / cap) (default: none; only Plinth reads a model that has one)"""
    activation: Literal["swiglu", "relu2", "geglu", "gelu", "gelu_tanh"] = "swiglu"
    """feed-forward layer: swiglu or geglu, down(f(gate(x)) * up(x)) with SiLU or tanh-GELU; gelu, gelu_tanh or relu2, down(f(up(x)))"""
    residual_scalars: bool = False
    """learn two factors a block, on the residual stream and on the normalised embedding added to it (only Plinth reads such a model)"""
    value_embeddings: bool = False
    """add an embedding of the token, behind a learnt gate, to the values of every other block (only Plinth reads such a model)"""
    norm: Literal["rms", "layer"] = "rms"
    """normalisation: rms (RMSNorm) or layer (LayerNorm, with a bias where its scales are learnt)"""
    norm_offset: float = 0.0
    """added to the learnt scales of RMSNorm (Gemma: 1)"""
    post_norms: bool = False
    """normalise also what attention and feed-forward layer give, before it is added to the residual stream (Gemma)"""
    qk_norm: bool = True
    """normalise queries and keys"""
    qkv_bias: bool = False
    """add a bias to queries, keys and values"""
    out_bias: bool = False
    """add a bias to attention's output projection"""
    mlp_bias: bool = False
    """add biases to the matrices of the feed-forward layer"""
    position: Literal["rope", "learned"] = "rope"
    """how a token's place is told: rope (rotary) or learned (an embedding of max_seq_len places)"""
    rope_scaling: RopeScaling | None = None
    """change of the rotary frequencies for longer texts; blocks with a sliding window and local_rope_theta keep theirs"""
    sliding_window: int | None = None
    """tokens, itself included, that a token attends to in blocks with a window (default: all before it)"""
    window_layers: tuple[bool, ...] | None = None
    """which blocks have the window, repeated over the blocks: True False for every other, the first included (default: all)"""
    local_rope_theta: float | None = None
    """base of the rotary frequencies in blocks with a window (default: rope_theta)"""
    attention_softcap: float | None = None
    """bound of attention's scores, as cap * tanh(score / cap) (Gemma 2; default: none)"""
    query_scale: float | None = None
    """factor on attention's scores in place of 1/sqrt(head_dim)"""
    embed_multiplier: float = 1.0
    """factor on the token embeddings where they enter the first block (Gemma: sqrt(hidden_size))"""
    num_experts: int = 0
    """feed-forward layers a block of which each token takes some; 0 for one feed-forward layer that all take"""
    num_active_experts: int = 2
    """experts that a token takes"""
    expert_intermediate_size: int | None = None
    """width of an expert (default: intermediate_size)"""
    shared_expert_intermediate_size: int = 0
    """width of a feed-forward layer that all tokens take beside their experts; 0 for none"""
    shared_expert_gate: bool = False
    """multiply what the shared expert gives by the sigmoid of a learnt product with its input (Qwen2-MoE)"""
    norm_topk_prob: bool = True
    """let the weights of a token's experts sum to 1"""
    router_aux_loss: float = 0.01
    """factor on the load-balancing loss in training"""
    router_z_loss: float = 0.001
    """factor on the squared log-sum of the router's scores in training"""
    dense_layers: tuple[int, ...] = ()
    """blocks, counted from 0, that have one feed-forward layer of intermediate_size in place of experts"""
    published_as: str | None = None
    """model_type that Hugging Face's config.json gets (default: the first family that holds the decoder, else plinth)"""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_choices(self)
        _check_attention(self)
        _check_experts(self)

    @property
    def extras(self) -> dict[str, Any]:
        """Return the options, by name, in which the arithmetic differs from the default decoder's."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in EXTRAS + FAMILY if getattr(self, name) != defaults[name]}

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer has a gate matrix."""
        return self.activation in GATED

    def slides(self, layer: int) -> bool:
        """Return whether a block, counted from 0, attends to no more than the sliding window."""
        if self.sliding_window is None or self.window_layers is None:
            return self.sliding_window is not None
        return self.window_layers[layer % len(self.window_layers)]

    def has_experts(self, layer: int) -> bool:
        """Return whether the feed-forward layer of a block, counted from 0, is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def expert_size(self) -> int:
        """Width of an expert."""
        return self.expert_intermediate_size or self.intermediate_size

    @property
    def score_scale(self) -> float:
        """Factor on the products of queries and keys; where places are rotated, the rotation carries the attention multiplier."""
        scale = self.head_dim**-0.5 if self.query_scale is None else self.query_scale
        return scale if self.position == "rope" else scale * self.attention_multiplier

    @property
    def kv_dim(self) -> int:
        """Width of one position's keys, or values, of one block."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_mlp_matrices(self) -> int:
        """How many matrices of hidden_size x intermediate_size a feed-forward layer has: gate, up and down, or up and down."""
        return 3 if self.is_gated else 2

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether a block, counted from 0, has a value embedding: the last, and every other before it (as in nanochat)."""
        return self.value_embeddings and (self.num_layers - 1 - layer) % 2 == 0

    @property
    def num_value_embeddings(self) -> int:
        return (self.num_layers + 1) // 2 if self.value_embeddings else 0

    @property
    def value_gate_channels(self) -> int:
        """How many channels of its input attention reads to open the gate of the value embedding."""
        return min(VALUE_GATE_CHANNELS, self.hidden_size)

    @property
    def has_multipliers(self) -> bool:
        return any(getattr(self, name) != 1.0 for name in MULTIPLIERS)

    @property
    def stream_factor(self) -> float:
        """By how much the residual stream shrinks when the output multiplier is folded into an embedding that is the head too."""
        return self.output_multiplier if self.tie_embeddings else 1.0


def _check_sizes(config: DecoderConfig) -> None:
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "intermediate_size", "max_seq_len"):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1.")
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}. "
            "Use a divisor of num_heads, for instance 1 or num_heads itself."
        )
    if config.head_dim % 2 and config.position == "rope":
        raise UserError(f"head_dim={config.head_dim} is odd; rotary embedding needs an even one.")
    if config.norm_eps <= 0 or config.rope_theta <= 0:
        raise UserError(f"norm_eps={config.norm_eps} and rope_theta={config.rope_theta} must be positive.")


def _check_choices(config: DecoderConfig) -> None:
    if config.activation not in ACTIVATIONS:
        raise UserError(f"activation={config.activation!r} is unknown. Use one of {', '.join(ACTIVATIONS)}.")
    for name, choices in (("norm", ("rms", "layer")), ("position", ("rope", "learned"))):
        if getattr(config, name) not in choices:
            raise UserError(f"{name}={getattr(config, name)!r} is unknown. Use one of {', '.join(choices)}.")
    if config.norm_offset and (config.norm == "layer" or not config.learnable_norm):
        raise UserError(
            f"norm_offset={config.norm_offset} is added to learnt scales of RMSNorm: it needs norm=rms and learnable_norm=True."
        )
    if config.output_multiplier <= 0 or config.attention_multiplier <= 0:
        raise UserError(
            f"output_multiplier={config.output_multiplier} and attention_multiplier={config.attention_multiplier} must be positive."
        )
    if config.embed_multiplier <= 0:
        raise UserError(f"embed_multiplier={config.embed_multiplier} must be positive. Leave it at 1 for embeddings as they are.")
    if config.logit_softcap is not None and config.logit_softcap <= 0:
        raise UserError(f"logit_softcap={config.logit_softcap} must be positive. Leave it out for logits without a bound.")


def _check_attention(config: DecoderConfig) -> None:
    for name in ("attention_softcap", "query_scale", "local_rope_theta"):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise UserError(f"{name}={getattr(config, name)} must be positive. Leave it out for a decoder without it.")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise UserError(f"sliding_window={config.sliding_window} must be at least 1 token. Leave it out to attend to all before.")
    if config.window_layers is not None and not 1 <= len(config.window_layers) <= config.num_layers:
        raise UserError(f"window_layers has {len(config.window_layers)} entries; it needs 1 to num_layers={config.num_layers}.")
    if config.sliding_window is None and (config.window_layers is not None or config.local_rope_theta is not None):
        raise UserError("window_layers and local_rope_theta concern blocks with a window. Set sliding_window, or leave them out.")
    if config.position == "learned" and (config.rope_scaling is not None or config.local_rope_theta is not None):
        raise UserError("position=learned rotates nothing. Leave rope_scaling and local_rope_theta out, or use position=rope.")


def _check_experts(config: DecoderConfig) -> None:
    for name in ("num_experts", "num_active_experts", "shared_expert_intermediate_size", "router_aux_loss", "router_z_loss"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} must not be negative.")
    if config.num_experts == 0:
        given = [name for name in ("expert_intermediate_size", "shared_expert_intermediate_size", "dense_layers") if getattr(config, name)]
        if given:
            raise UserError(f"{given[0]}={getattr(config, given[0])} has no meaning without experts. Set num_experts, or leave it out.")
        return
    if not 1 <= config.num_active_experts <= config.num_experts:
        raise UserError(f"num_active_experts={config.num_active_experts} must be from 1 to num_experts={config.num_experts}.")
    if config.expert_intermediate_size is not None and config.expert_intermediate_size < 1:
        raise UserError(f"expert_intermediate_size={config.expert_intermediate_size} must be at least 1.")
    if any(not 0 <= layer < config.num_layers for layer in config.dense_layers):
        raise UserError(f"dense_layers={config.dense_layers} names blocks beyond 0 to num_layers - 1 = {config.num_layers - 1}.")
    if config.shared_expert_gate and not config.shared_expert_intermediate_size:
        raise UserError("shared_expert_gate=True needs a shared expert. Set shared_expert_intermediate_size, or leave the gate out.")
    if not config.is_gated or config.mlp_bias:
        raise UserError("experts are gated layers without biases. Use activation=swiglu or geglu and mlp_bias=False.")
