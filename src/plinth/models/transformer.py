"""The decoder: blocks of attention and feed-forward layers on a residual stream."""

from __future__ import annotations

import torch
from torch import nn

from plinth.models.attention import Attention
from plinth.models.config import DecoderConfig
from plinth.models.kv_cache import KVCache
from plinth.models.mlp import RMSNorm, SwiGLU
from plinth.ops.rope import rope_table


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, config.learnable_norm)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x, delta, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the residual stream and what is still to be added to it; return the same two.

        Handing on the sum unfinished lets each sum fuse with the normalisation that follows it.
        """
        x, normed = self.attention_norm.add(x, delta)
        x, normed = self.mlp_norm.add(x, self.attention(normed, cos, sin))
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
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                parameter.zero_()
            else:
                deviation = self.embed_deviation if name == "embed.weight" else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, deviation, generator=generator)
        return self

    @property
    def embed_deviation(self) -> float:
        return 0.02 if self.config.tie_embeddings else 1.0

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix, shape (V, D)."""
        return self.embed.weight if self.head is None else self.head.weight

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin for positions, shape (*positions.shape, E), in the model's dtype."""
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        dtype = self.embed.weight.dtype
        return cos.to(dtype), sin.to(dtype)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return hidden states after the last norm, shape (B, T, D)."""
        cos, sin = self.rotation(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        x, delta = self.embed(tokens_BT), None
        for layer in self.layers:
            x, delta = layer(x, delta, cos, sin)
        return self.final_norm.add(x, delta)[1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return next-token scores, shape (..., V)."""
        return nn.functional.linear(hidden, self.output_weight)

    @torch.no_grad()
    def forward_rows(self, tokens_N, positions_N, slots_N, cache: KVCache) -> torch.Tensor:
        """Run N independent rows of a ragged batch against the cache; returns hidden states (N, D).

        Row i is the token at position positions_N[i] of slot slots_N[i]. Keys and values of all rows are written
        before any row attends, so the rows of one prompt may come in one call, and it sees positions up to its own.
        """
        cos, sin = self.rotation(positions_N)
        x = self.embed(tokens_N)
        for i, layer in enumerate(self.layers):
            attended = layer.attention.forward_rows(layer.attention_norm(x), cos, sin, positions_N, slots_N, cache, i)
            x = x + attended
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.final_norm(x)
