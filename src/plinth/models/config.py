"""What a decoder is: its shape, in Hugging Face's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from plinth.config import UserError

MULTIPLIERS = ("output_multiplier", "attention_multiplier")
EXTRAS = ("logit_softcap", "activation", "residual_scalars", "value_embeddings")  # options that no other program's format holds
HIDDEN_ACTS = {"swiglu": "silu", "relu2": "relu2"}  # activation → what config.json calls it
VALUE_GATE_CHANNELS = 12


@dataclass(frozen=True)
class DecoderConfig:
    """The default decoder: Qwen3's shape (RMSNorm, RoPE, SwiGLU, QK-norm, grouped-query attention)."""

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
    activation: Literal["swiglu", "relu2"] = "swiglu"
    """feed-forward layer: swiglu, down(silu(gate(x)) * up(x)), or relu2, down(relu(up(x))^2) without a gate (only Plinth reads it)"""
    residual_scalars: bool = False
    """learn two factors a block, on the residual stream and on the normalised embedding added to it (only Plinth reads such a model)"""
    value_embeddings: bool = False
    """add an embedding of the token, behind a learnt gate, to the values of every other block (only Plinth reads such a model)"""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "intermediate_size", "max_seq_len"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}. "
                "Use a divisor of num_heads, for instance 1 or num_heads itself."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embedding needs an even one.")
        if self.output_multiplier <= 0 or self.attention_multiplier <= 0:
            raise UserError(
                f"output_multiplier={self.output_multiplier} and attention_multiplier={self.attention_multiplier} must be positive."
            )
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise UserError(f"logit_softcap={self.logit_softcap} must be positive. Leave it out for logits without a bound.")
        if self.activation not in HIDDEN_ACTS:
            raise UserError(f"activation={self.activation!r} is unknown. Use one of {', '.join(HIDDEN_ACTS)}.")
        if self.norm_eps <= 0 or self.rope_theta <= 0:
            raise UserError(f"norm_eps={self.norm_eps} and rope_theta={self.rope_theta} must be positive.")

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of config.json as transformers, vLLM and llama.cpp read it, for weights without multipliers.

        A decoder with extras, which they would compute wrongly, is none of theirs: its model_type is "plinth", and they refuse it.
        """
        if self.extras:
            return self._shape_fields() | {
                "architectures": ["PlinthForCausalLM"],
                "model_type": "plinth",
                **{f"plinth_{name}": value for name, value in self.extras.items()},
            }
        return self._shape_fields() | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

    def _shape_fields(self) -> dict[str, Any]:
        folded = {"plinth_norm_eps": self.norm_eps} | {f"plinth_{name}": getattr(self, name) for name in MULTIPLIERS}
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps * self.stream_factor**2,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": HIDDEN_ACTS[self.activation],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "dtype": "float32",
            "plinth_learnable_norm": self.learnable_norm,
            **(folded if self.has_multipliers else {}),
        }

    @property
    def extras(self) -> dict[str, Any]:
        """Return the options, by name, that exported formats cannot hold and that are on."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in EXTRAS if getattr(self, name) != defaults[name]}

    @property
    def kv_dim(self) -> int:
        """Width of one position's keys, or values, of one block."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_mlp_matrices(self) -> int:
        """How many matrices of hidden_size x intermediate_size a block has: gate, up and down, or up and down."""
        return 3 if self.activation == "swiglu" else 2

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

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> DecoderConfig:
        """Read config.json. Raises UserError when it describes an architecture other than Qwen3's, with our extras or without."""
        kind = values.get("model_type")
        if kind not in ("qwen3", "plinth"):
            raise UserError(f"model_type={kind!r} is not supported. Supported: qwen3 (the default decoder), plinth (it with extras).")
        extras = {name: values[f"plinth_{name}"] for name in EXTRAS if f"plinth_{name}" in values}
        if bool(extras) != (kind == "plinth"):
            raise UserError(f"model_type={kind!r} does not go with the extras {sorted(extras)}. Copy the model's own config.json again.")
        try:
            rope = values.get("rope_parameters") or {}
            heads = values["num_attention_heads"]
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=values["hidden_size"],
                num_layers=values["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=values.get("num_key_value_heads") or heads,
                head_dim=values.get("head_dim") or values["hidden_size"] // heads,
                intermediate_size=values["intermediate_size"],
                max_seq_len=values["max_position_embeddings"],
                rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10_000.0))),
                norm_eps=values.get("plinth_norm_eps", values.get("rms_norm_eps", 1e-6)),
                tie_embeddings=values.get("tie_word_embeddings", False),
                learnable_norm=values.get("plinth_learnable_norm", True),
                **{name: values.get(f"plinth_{name}", 1.0) for name in MULTIPLIERS},
                **extras,
            )
        except KeyError as error:
            raise UserError(f"config.json lacks {error}; a Qwen3 configuration needs it.") from None
