"""The pre-norm stack that CLIP's two towers are: attention and a two-layer feed-forward net, all with biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.models.bidirectional import BiasedLinear, LayerNorm, MultiHeadAttention

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x · sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
PUBLISHED_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def check_tower(where: str, config) -> None:
    """Raise UserError for the shape of a stack that cannot be built; `where` begins its text."""
    for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{where}{name}={getattr(config, name)} must be at least 1.")
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"{where}hidden_size={config.hidden_size} is not a multiple of num_heads={config.num_heads}. Use a divisor of hidden_size."
        )
    if config.norm_eps <= 0:
        raise UserError(f"{where}norm_eps={config.norm_eps} must be positive.")
    if config.activation not in ACTIVATIONS:
        raise UserError(f"{where}activation={config.activation!r} is not one of {', '.join(ACTIVATIONS)}.")


class TowerBlock(nn.Module):
    """Attention and feed-forward net, each behind a layer normalisation and added to the stream."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = MultiHeadAttention(config.hidden_size, config.num_heads)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.up = BiasedLinear(config.hidden_size, config.intermediate_size)
        self.down = BiasedLinear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: torch.Tensor, causal: bool) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), causal=causal)
        return x_BTD + self.down(self.activation(self.up(self.mlp_norm(x_BTD))))


class Tower(nn.ModuleList):
    """The blocks in order; `config` has hidden_size, num_layers, num_heads, intermediate_size, activation and norm_eps."""

    def __init__(self, config):
        super().__init__(TowerBlock(config) for _ in range(config.num_layers))
        self.config = config

    def forward(self, x_BTD: torch.Tensor, *, causal: bool = False, num_layers: int | None = None) -> torch.Tensor:
        """Return the stream behind the first num_layers blocks (default: all), shape (B, T, D)."""
        for block in list(self)[:num_layers]:
            x_BTD = block(x_BTD, causal)
        return x_BTD

    @torch.no_grad()
    def attention_weights(self, x_BTD: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """Return what each block attends to, fp32 (L, B, H, T, S)."""
        layers = []
        for block in self:
            layers.append(block.attention.weights(block.attention_norm(x_BTD), causal=causal))
            x_BTD = block(x_BTD, causal)
        return torch.stack(layers)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the matrices; biases start at 0. What writes to the stream starts smaller the deeper the stack.

        Source: Radford et al. 2021, arXiv:2103.00020, released code: deviations D^-1/2, (2 D)^-1/2 and D^-1/2 (2 L)^-1/2.
        """
        width, depth = self.config.hidden_size, self.config.num_layers
        for block in self:
            for layer, deviation in (
                (block.attention.qkv, width**-0.5),
                (block.attention.out, width**-0.5 * (2 * depth) ** -0.5),
                (block.up, (2 * width) ** -0.5),
                (block.down, width**-0.5 * (2 * depth) ** -0.5),
            ):
                layer.weight.normal_(0.0, deviation, generator=generator)
                layer.bias.zero_()
            for norm in (block.attention_norm, block.mlp_norm):
                norm.reset_parameters()

    def matrix_parts(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the matrices by name behind a prefix, with the row counts of the projections fused in each."""
        width, wide = self.config.hidden_size, self.config.intermediate_size
        for i in range(self.config.num_layers):
            yield f"{prefix}{i}.attention.qkv.weight", (width,) * 3
            yield f"{prefix}{i}.attention.out.weight", (width,)
            yield f"{prefix}{i}.up.weight", (wide,)
            yield f"{prefix}{i}.down.weight", (width,)
