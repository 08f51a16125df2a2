"""The feed-forward block and the normalisation module."""

from __future__ import annotations

import torch
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.ops.linear import linear, linear_rows
from plinth.ops.norm import add_rms_norm, rms_norm
from plinth.ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """Root-mean-square normalisation; `weight` is None when the scale is not learnt."""

    def __init__(self, size: int, eps: float, learnable: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if learnable else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta and its normalisation."""
        if self.weight is None:
            return add_rms_norm(x, delta, self.eps)
        total = x if delta is None else x + delta
        return total, rms_norm(total, self.weight, self.eps)


class Linear(nn.Linear):
    """A matrix without bias, multiplied by `plinth.ops.linear`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


class SwiGLU(nn.Module):
    """Gated feed-forward layer; gate and up projections are one matrix, gate first.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate_up(x)))

    def forward_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        return linear_rows(swiglu(linear_rows(x_ND, self.gate_up.weight)), self.down.weight)


class SquaredReLU(nn.Module):
    """Feed-forward layer without a gate: down(relu(up(x))²).

    Source: So et al. 2021, arXiv:2109.08668, section 3 (Primer).
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu().square())

    def forward_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        return linear_rows(linear_rows(x_ND, self.up.weight).relu().square(), self.down.weight)


def feed_forward(config: DecoderConfig) -> SwiGLU | SquaredReLU:
    """Return the feed-forward layer that a decoder's activation names."""
    kind = SwiGLU if config.activation == "swiglu" else SquaredReLU
    return kind(config.hidden_size, config.intermediate_size)
