"""The decoder: blocks of attention and feed-forward layers on a residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from plinth.models.attention import Attention
from plinth.models.config import DecoderConfig
from plinth.models.kv_cache import KVCache, Span
from plinth.models.mlp import RMSNorm, SwiGLU
from plinth.ops import kernels
from plinth.ops.linear import linear_rows
from plinth.ops.rope import rope_table
from plinth.ops.segments import positions_in_segments, segment_mask
from plinth.ops.softcap import softcap


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x, delta, cos, sin, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the residual stream and what is still to be added to it; return the same two.

        Handing on the sum unfinished lets each sum fuse with the normalisation that follows it.
        """
        x, normed = self.attention_norm.add(x, delta)
        x, normed = self.mlp_norm.add(x, self.attention(normed, cos, sin, mask))
        return x, self.mlp(normed)


class Transformer(nn.Module):
    """A decoder-only language model; `forward` gives hidden states, `logits` the scores of the next token."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> Transformer:
        """Draw the weights: normal with deviation 1/sqrt(fan_in); matrices that write to the residual stream start at 0.

        Zero output projections make every block the identity at first (as in modded-nanogpt and nanochat).
        """
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)
        return self

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        """Draw one parameter, given whole; all of them in the model's order give what `init_weights` gives."""
        if parameter.dim() < 2:
            parameter.fill_(1.0)
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            parameter.zero_()
        else:
            deviation = self.embed_deviation if name == "embed.weight" else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, deviation, generator=generator)

    @property
    def embed_deviation(self) -> float:
        return 0.02 if self.config.tie_embeddings else 1.0

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix, shape (V, D)."""
        return self.embed.weight if self.head is None else self.head.weight

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin for positions, shape (*positions.shape, E), in the model's dtype, or in fp32 for our kernels and on a GPU.

        Both fuse the products with it, so that fp32 costs nothing.
        """
        config = self.config
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta, config.attention_multiplier**0.5)
        fused = positions.device.type != "cpu" or kernels.usable(self.embed.weight)
        dtype = torch.float32 if fused else self.embed.weight.dtype
        return cos.to(dtype), sin.to(dtype)

    def forward(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states after the last norm, times the output multiplier, shape (B, T, D).

        With segments, attention keeps to each and positions restart in it, as if each stood alone.
        """
        positions, mask = torch.arange(tokens_BT.shape[1], device=tokens_BT.device), None
        if segments_BT is not None:
            positions, mask = positions_in_segments(segments_BT), segment_mask(segments_BT)
        cos, sin = self.rotation(positions)
        x, delta = self.embed(tokens_BT), None
        for layer in self.layers:
            x, delta = layer(x, delta, cos, sin, mask)
        return self._output(self.final_norm.add(x, delta)[1])

    def _output(self, normed: torch.Tensor) -> torch.Tensor:
        factor = self.config.output_multiplier
        return normed if factor == 1.0 else normed * factor

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        parts = {}
        for i in range(config.num_layers):
            parts[f"layers.{i}.attention.qkv.weight"] = tuple(n * config.head_dim for n in heads)
            parts[f"layers.{i}.attention.out.weight"] = (config.hidden_size,)
            parts[f"layers.{i}.mlp.gate_up.weight"] = (config.intermediate_size,) * 2
            parts[f"layers.{i}.mlp.down.weight"] = (config.hidden_size,)
        return parts

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return next-token scores, shape (..., V); fp32 where they are capped."""
        return self._capped(nn.functional.linear(hidden, self.output_weight))

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self.config.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    @torch.no_grad()
    def forward_rows(self, tokens_N, positions_N, slots_N, cache: KVCache, spans: Sequence[Span] | None = None) -> torch.Tensor:
        """Run N rows of a ragged batch against the cache; returns hidden states (N, D). N is a multiple of ROW_TILE.

        Row i is the token at position positions_N[i] of slot slots_N[i]. Keys and values of all rows are written
        before any row attends, so the rows of one prompt may come in one call, and it sees positions up to its own.
        Spans tell which rows attend how, in order from row 0; rows behind the last one are padding.
        """
        views = cache.views(slots_N, positions_N, spans)
        cos_NE, sin_NE = cache.cos_SE[positions_N], cache.sin_SE[positions_N]
        x, delta = self.embed(tokens_N), None
        for i, layer in enumerate(self.layers):
            x, normed = layer.attention_norm.add(x, delta)
            delta = layer.attention.forward_rows(normed, cos_NE, sin_NE, positions_N, slots_N, cache, i, views)
            x, normed = layer.mlp_norm.add(x, delta)
            delta = layer.mlp.forward_rows(normed)
        return self._output(self.final_norm.add(x, delta)[1])

    @torch.no_grad()
    def logits_rows(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return next-token scores of N rows, a multiple of ROW_TILE, each independent of its company bit for bit."""
        return self._capped(linear_rows(hidden_ND, self.output_weight))
