"""Frozen weights of 4 bits for training adapters on them: 16 levels that are quantiles of the normal, scales that are quantised too.

4 bits a weight, 8 a block of 64 and 64 a row of 256 blocks: 4.13 bits a weight in all. `ops.quantise` has the formats for inference,
which are laid out for its kernels and have no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a step
# Quantiles of the standard normal, each divided by the largest; `tests/ops/test_nf4.py` derives them.
# Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Nf4:
    """A weight in NF4 with double quantisation, blocks running over its rows."""

    shape: tuple[int, ...]
    """of the weight"""
    codes_N: torch.Tensor
    """uint8, two weights each, the first in the upper half"""
    scales_G: torch.Tensor
    """int8, one a block: a multiple of its row's step, added to the mean"""
    steps_S: torch.Tensor
    """int32, the bits of an fp32 step for every 256 scales and, last, those of the mean; as integers no change of dtype rounds them"""

    @property
    def num_bytes(self) -> int:
        """Return what is held."""
        return sum(part.numel() * part.element_size() for part in (self.codes_N, self.scales_G, self.steps_S))


def quantise_nf4(weight: torch.Tensor) -> Nf4:
    """Round a weight to NF4.

    Each block's scale is its largest magnitude; the mean of all scales is taken off and what is left is rounded to 8 bits in rows of
    256.  Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    Differs: the second rounding is to int8, not to a float of 8 bits, and the levels are chosen for the scale as it will be read back.
    """
    blocks_GK = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest_G = blocks_GK.abs().amax(1)
    mean = largest_G.mean()
    rows_SG = F.pad(largest_G - mean, (0, -len(largest_G) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    steps_S = rows_SG.abs().amax(1) / 127.0
    scales_G = (rows_SG / steps_S[:, None]).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8).flatten()[: len(largest_G)]
    steps = torch.cat([steps_S, mean[None]]).view(torch.int32)
    restored_G = restore_scales(scales_G, steps)
    relative_GK = (blocks_GK / restored_G[:, None]).nan_to_num(0.0, posinf=1.0, neginf=-1.0)
    codes = torch.bucketize(relative_GK, _borders().to(weight.device)).to(torch.uint8).view(-1, 2)
    return Nf4(tuple(weight.shape), codes[:, 0] << 4 | codes[:, 1], scales_G, steps)


def restore_scales(scales_G: torch.Tensor, steps_S: torch.Tensor) -> torch.Tensor:
    """Return the scales of the blocks in fp32; the rounding may not make one negative."""
    *_, mean = values = steps_S.view(torch.float32)
    wide = values[:-1].repeat_interleave(SCALE_BLOCK)[: len(scales_G)]
    return torch.addcmul(mean, scales_G.float(), wide).clamp_min(0.0)


def dequantise_nf4(weight: Nf4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight that the codes stand for; rounded to `dtype` once."""
    pairs_N2 = _pairs(weight.codes_N.device)[weight.codes_N.int()]
    scales_G = restore_scales(weight.scales_G, weight.steps_S)
    blocks_GK = pairs_N2.view(-1, BLOCK) * scales_G[:, None]
    return blocks_GK.view(-1)[: math.prod(weight.shape)].view(weight.shape).to(dtype)


@lru_cache(maxsize=4)
def _pairs(device: torch.device) -> torch.Tensor:
    """Return the two levels that each byte stands for, fp32 (256, 2)."""
    levels, bytes_ = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[bytes_ >> 4], levels[bytes_ & 15]], dim=1).to(device)


@lru_cache(maxsize=1)
def _borders() -> torch.Tensor:
    levels = torch.tensor(LEVELS)
    return (levels[1:] + levels[:-1]) / 2


class _Nf4Linear(torch.autograd.Function):
    """x · weightᵀ that keeps the codes for the backward pass, where saving the weight would keep all layers' weights whole at once."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return F.linear(x, dequantise_nf4(weight, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantise_nf4(ctx.weight, grad.dtype), None


def nf4_linear(x: torch.Tensor, weight: Nf4) -> torch.Tensor:
    """Return x · weightᵀ, shape (..., F); the weight is whole only while it is multiplied. Its gradient reaches x alone."""
    return _Nf4Linear.apply(x, weight)
