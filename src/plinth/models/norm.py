"""Normalisation as modules: RMSNorm and LayerNorm, each also as the sum of a residual stream and what is added to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.ops.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation; `weight` is None when the scale is not learnt. The scale is offset + weight."""

    def __init__(self, size: int, eps: float, learnable: bool, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset)) if learnable else None
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.offset:  # the sum in fp32: in bf16 a small weight would vanish beside the offset
            return rms_norm(x.float(), self.offset + self.weight.float(), self.eps).to(x.dtype)
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta and its normalisation."""
        if self.offset:
            total = x if delta is None else x + delta
            return total, self(total)
        total, normed = add_rms_norm(x, delta, self.eps)
        return total, normed if self.weight is None else normed * self.weight


class LayerNorm(nn.Module):
    """Zero mean and unit variance over the last dimension; `weight` and `bias` are None when they are not learnt.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    def __init__(self, size: int, eps: float, learnable: bool):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if learnable else None
        self.bias = nn.Parameter(torch.zeros(size)) if learnable else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta and its normalisation."""
        total = x if delta is None else x + delta
        return total, self(total)


def normalisation(config: DecoderConfig, size: int) -> RMSNorm | LayerNorm:
    """Return the normalisation of a width that a decoder's configuration names."""
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps, config.learnable_norm)
    return RMSNorm(size, config.norm_eps, config.learnable_norm, config.norm_offset)
