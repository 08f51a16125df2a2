"""The decoder: blocks of attention and feed-forward layers on a residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from plinth.models.attention import Attention
from plinth.models.config import DecoderConfig
from plinth.models.kv_cache import PagedCache, View
from plinth.models.mlp import RMSNorm, feed_forward
from plinth.ops import kernels
from plinth.ops.linear import linear_rows
from plinth.ops.norm import add_rms_norm
from plinth.ops.rope import rope_table
from plinth.ops.segments import positions_in_segments, segment_mask
from plinth.ops.softcap import softcap

# What a parameter's name ends with; of the others, those of one dimension start at 1, and the matrices are drawn.
START_AT_ZERO = ("attention.out.weight", "mlp.down.weight", "x0_lambda", "value_embed.table.weight", "value_embed.gate.weight")


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, config: DecoderConfig, layer: int = 0):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.mlp = feed_forward(config)

    def forward(self, x, delta, cos, sin, mask=None, tokens=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the residual stream and what is still to be added to it; return the same two. A value embedding needs the tokens.

        Handing on the sum unfinished lets each sum fuse with the normalisation that follows it.
        """
        x, normed = self.attention_norm.add(x, delta)
        x, normed = self.mlp_norm.add(x, self.attention(normed, cos, sin, mask, tokens))
        return x, self.mlp(normed)


class Transformer(nn.Module):
    """A decoder-only language model; `forward` gives hidden states, `logits` the scores of the next token."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.resid_lambda = nn.Parameter(torch.ones(config.num_layers)) if config.residual_scalars else None
        self.x0_lambda = nn.Parameter(torch.zeros(config.num_layers)) if config.residual_scalars else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> Transformer:
        """Draw the weights: normal with deviation 1/sqrt(fan_in); matrices that write to the residual stream start at 0.

        Zero output projections make every block the identity at first (as in modded-nanogpt and nanochat). What the options of the
        model add starts where it changes nothing, and takes no random numbers: the other weights are those of the model without.
        """
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)
        return self

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        """Draw one parameter, given whole; all of them in the model's order give what `init_weights` gives."""
        if name.endswith(START_AT_ZERO):
            parameter.zero_()
        elif parameter.dim() < 2:
            parameter.fill_(1.0)
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
        first = self._first(x)
        for i, layer in enumerate(self.layers):
            x, delta = layer(*self._mixed(i, x, delta, first), cos, sin, mask, tokens_BT)
        return self._output(self.final_norm.add(x, delta)[1])

    def _first(self, embedded: torch.Tensor) -> torch.Tensor | None:
        """Return the normalised embedding that `_mixed` adds to the residual stream; None without residual scalars."""
        return add_rms_norm(embedded, None, self.config.norm_eps)[1] if self.config.residual_scalars else None

    def _mixed(self, i: int, x, delta, first) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the residual stream before block i, and what is still to be added: resid_lambda · (x + delta) + x0_lambda · first.

        Source: modded-nanogpt and nanochat.  Differs: x0_lambda starts at 0, where nanochat's starts at 0.1.
        """
        if self.resid_lambda is None or self.x0_lambda is None:
            return x, delta
        total = x if delta is None else x + delta
        return self.resid_lambda[i] * total + self.x0_lambda[i] * first, None

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
            if config.activation == "swiglu":
                parts[f"layers.{i}.mlp.gate_up.weight"] = (config.intermediate_size,) * 2
            else:
                parts[f"layers.{i}.mlp.up.weight"] = (config.intermediate_size,)
            parts[f"layers.{i}.mlp.down.weight"] = (config.hidden_size,)
        return parts

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return next-token scores, shape (..., V); fp32 where they are capped."""
        return self._capped(nn.functional.linear(hidden, self.output_weight))

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self.config.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    @torch.no_grad()
    def forward_rows(self, tokens_N, positions_N, places_N, cache: PagedCache, views: Sequence[View]) -> torch.Tensor:
        """Run N rows of a ragged batch against the cache; returns hidden states (N, D). N is a multiple of ROW_TILE.

        Row i is the token at position positions_N[i] of its sequence; its keys and values go to place places_N[i] of the
        cache. Those of all rows are written before any row attends, so the rows of one prompt may come in one call.
        Views tell which rows attend how, in order from row 0; rows behind the last one are padding.
        """
        cos_NE, sin_NE = cache.cos_SE[positions_N], cache.sin_SE[positions_N]
        x, delta = self.embed(tokens_N), None
        first = self._first(x)
        for i, layer in enumerate(self.layers):
            x, delta = self._mixed(i, x, delta, first)
            x, normed = layer.attention_norm.add(x, delta)
            delta = layer.attention.forward_rows(normed, cos_NE, sin_NE, places_N, tokens_N, cache, i, views)
            x, normed = layer.mlp_norm.add(x, delta)
            delta = layer.mlp.forward_rows(normed)
        return self._output(self.final_norm.add(x, delta)[1])

    @torch.no_grad()
    def logits_rows(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return next-token scores of N rows, a multiple of ROW_TILE, each independent of its company bit for bit."""
        return self._capped(linear_rows(hidden_ND, self.output_weight))
