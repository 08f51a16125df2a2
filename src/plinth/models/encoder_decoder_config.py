"""What an encoder-decoder is: the Transformer of 2017 and T5, told apart by one field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from plinth.config import UserError

GATED = ("geglu",)
ACTIVATIONS = ("relu", "gelu", "silu", *GATED)


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder that reads a source and a decoder that writes a target, attending to it."""

    style: Literal["transformer", "t5"] = "transformer"
    """transformer: of 2017, normalisation behind each sum, sinusoidal positions, biases; t5: RMSNorm before each layer, learnt biases
    by distance, no other biases"""
    vocab_size: int = 8000
    """token ids of the source, and of the target where that has none of its own"""
    target_vocab_size: int | None = None
    """token ids of a target with a vocabulary, and embedding, of its own (default: shared with the source)"""
    hidden_size: int = 256
    """width of the residual stream"""
    num_layers: int = 3
    """blocks of the encoder"""
    num_decoder_layers: int | None = None
    """blocks of the decoder (default: as many as the encoder's)"""
    num_heads: int = 4
    """heads of each attention"""
    head_dim: int = 64
    """width of a head; hidden_size / num_heads in the transformer"""
    intermediate_size: int = 1024
    """width of the feed-forward layers"""
    activation: Literal["relu", "gelu", "silu", "geglu"] = "relu"
    """of the feed-forward layers; geglu is gated by the tanh form of gelu (T5 1.1, mT5)"""
    max_seq_len: int = 256
    """longest source, and target, in tokens, the end included"""
    dropout: float = 0.1
    """share of the elements dropped in training: of each layer's result and of the embeddings"""
    norm_eps: float = 1e-5
    """added to the variance (transformer) or mean square (t5) before the root"""
    tie_embeddings: bool = True
    """use the target's embedding as output head; t5 then divides the last hidden states by sqrt(hidden_size)"""
    scale_embedding: bool = True
    """transformer: multiply embeddings by sqrt(hidden_size) before positions are added"""
    output_bias: bool = False
    """transformer: add fixed numbers to the logits, as published Marian models have them; not trained"""
    relative_buckets: int = 32
    """t5: distances told apart by the bias of attention"""
    relative_max_distance: int = 128
    """t5: tokens from which on all distances share a bucket"""
    pad_id: int = 1
    """token id that fills rows up"""
    start_id: int = 1
    """token id that the decoder starts from"""
    end_id: int = 0
    """token id behind each sentence"""

    def __post_init__(self) -> None:
        counts = ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim", "intermediate_size", "max_seq_len")
        for name in (*counts, "target_vocab_size", "num_decoder_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        if self.style not in ("transformer", "t5"):
            raise UserError(f"style={self.style!r} is unknown. Use transformer or t5.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r} is unknown. Use one of {', '.join(ACTIVATIONS)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be 0 or more and less than 1.")
        if self.norm_eps <= 0:
            raise UserError(f"norm_eps={self.norm_eps} must be positive.")
        for name in ("pad_id", "start_id", "end_id"):
            if not 0 <= getattr(self, name) < min(self.vocab_size, self.output_size):
                raise UserError(f"{name}={getattr(self, name)} lies outside the vocabulary of {min(self.vocab_size, self.output_size)}.")
        self._check_t5() if self.is_t5 else self._check_transformer()

    def _check_transformer(self) -> None:
        if self.num_heads * self.head_dim != self.hidden_size:
            raise UserError(
                f"num_heads={self.num_heads} of head_dim={self.head_dim} do not make hidden_size={self.hidden_size}. "
                f"Set head_dim to hidden_size / num_heads, {self.hidden_size / self.num_heads:g}."
            )
        if not self.tie_embeddings and self.target_vocab_size is None:
            raise UserError(
                "tie_embeddings=False with one vocabulary has no place in Marian's format: there all three tables are one, or none are. "
                "Set target_vocab_size too, for a target with an embedding of its own."
            )
        if self.hidden_size % 2:
            raise UserError(f"hidden_size={self.hidden_size} is odd; sinusoidal positions need an even one.")

    def _check_t5(self) -> None:
        if self.target_vocab_size is not None or self.output_bias:
            raise UserError("target_vocab_size and output_bias are the transformer's: T5 has one vocabulary and no biases.")
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise UserError(f"relative_buckets={self.relative_buckets} must be a multiple of 4: near and far, before and behind.")
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"relative_max_distance={self.relative_max_distance} must be above half of relative_buckets={self.relative_buckets}."
            )

    @property
    def is_t5(self) -> bool:
        return self.style == "t5"

    @property
    def query_scale(self) -> float:
        """Factor on attention's scores: 1/sqrt(head_dim), in T5 the power of two next to it, by which its published queries are smaller.

        T5 has no factor. With one, queries start and move as those of other models do; a power of two changes no bit on the way.
        """
        return 2.0 ** -round(math.log2(self.head_dim) / 2) if self.is_t5 else self.head_dim**-0.5

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def output_size(self) -> int:
        """Token ids that the head scores."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def is_gated(self) -> bool:
        return self.activation in GATED


def forward_flops(config: EncoderDecoderConfig, source_len: float, target_len: float) -> float:
    """Return the operations of one forward pass of a pair, two a multiply-add, attention over all positions; norms are left out."""
    D, W, F, S, T = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size, source_len, target_len
    mlp = (3 if config.is_gated else 2) * D * F
    encoder = config.num_layers * S * (2 * (4 * D * W + mlp) + 4 * W * S)
    decoder = config.decoder_layers * (T * (2 * (6 * D * W + mlp) + 4 * W * (T + S)) + S * 2 * 2 * D * W)
    return encoder + decoder + 2 * T * D * config.output_size


def train_flops_per_target_token(config: EncoderDecoderConfig, source_len: float, target_len: float) -> float:
    """Return the operations of a training step a counted token: three forward passes of a pair of mean lengths over its target's tokens."""
    return 3 * forward_flops(config, source_len, target_len) / target_len
