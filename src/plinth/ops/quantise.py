"""Weights of 8 and of 4 bits: rounded in groups of inputs that share a scale, multiplied by rows rounded to int8.

Integer sums over a group are exact and those over groups have one order, so a row's product has the same bits in any company.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from plinth.ops import kernels
from plinth.ops.matrix import FORMATS, PANEL, PackedMatrix, Place, aligned_copy, own_memory

GROUP = 64  # inputs that share a scale: what one instruction of the matrix unit adds up
BITS = {"int8": 8, "int4": 4}
# What 4 bits stand for, times the scale: Lloyd's levels of least squared error for normal numbers in groups of 64, each divided by
# its largest, whose level is the first. `tests/ops/test_quantise.py` finds them again.
LEVELS = (-124, -98, -78, -62, -47, -34, -22, -10, 1, 13, 25, 38, 52, 67, 86, 109)
FRACTIONS = (1.0, 0.92, 0.85, 1.08)  # of the largest level, tried as the place of a group's largest weight


@dataclass(frozen=True)
class Quantised:
    """A weight (outputs, inputs) in groups: each weight is an int8 times its group's scale."""

    format: str
    """'int8' or 'int4'; with the latter every value is one of LEVELS"""
    outputs: int
    """rows of the weight"""
    inputs: int
    """columns of the weight"""
    values_FGK: torch.Tensor
    """int8 (outputs, groups, 64)"""
    scales_FG: torch.Tensor
    """bf16 (outputs, groups)"""


def quantise(weight_FD: torch.Tensor, format: str) -> Quantised:
    """Round a weight to the nearest values of a format. The slow twin of `pack_quantised`."""
    groups_FGK = _groups(weight_FD.detach().float())
    values, scales = _round_int8(groups_FGK) if format == "int8" else _round_int4(groups_FGK)
    return Quantised(format, weight_FD.shape[0], weight_FD.shape[1], values, scales)


def dequantise(weight: Quantised) -> torch.Tensor:
    """Return the weight that the values stand for, fp32 (outputs, inputs)."""
    products = weight.values_FGK.float() * weight.scales_FG.float()[..., None]
    return products.flatten(1)[:, : weight.inputs].contiguous()


def _groups(x_ND: torch.Tensor) -> torch.Tensor:
    return F.pad(x_ND, (0, -x_ND.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _round_int8(groups_FGK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales_FG = (groups_FGK.abs().amax(-1) / 127.0).bfloat16()
    values = (groups_FGK / scales_FG.float()[..., None]).round().clamp(-127, 127)
    return torch.where(scales_FG[..., None] == 0, 0, values).to(torch.int8), scales_FG


def _round_int4(groups_FGK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of scales that put the largest weight at either end, take the one whose levels, fitted by least squares, come closest."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    largest = groups_FGK.abs().amax(-1, keepdim=True)
    best = best_gain = best_scale = None
    for fraction in FRACTIONS:
        for end in (levels[0].neg(), levels[0]):
            places = (groups_FGK * (end * fraction / largest)).round().clamp(-127, 127).nan_to_num()
            trial = nearest_levels()[places.long() + 128].float()
            dot, length = (groups_FGK * trial).sum(-1), trial.square().sum(-1)
            gain, scale = dot * (dot / length), dot / length
            if best is None:
                best, best_gain, best_scale = trial, gain, scale
                continue
            better = gain > best_gain
            best = torch.where(better[..., None], trial, best)
            best_gain, best_scale = torch.where(better, gain, best_gain), torch.where(better, scale, best_scale)
    return best.to(torch.int8), best_scale.bfloat16()


def nearest_levels() -> torch.Tensor:
    """Return, for each of -128 .. 127, the level nearest to it, int8 (256,); the lower of two equally near."""
    levels = torch.tensor(LEVELS)
    distances = (torch.arange(-128, 128)[:, None] - levels).abs()
    return levels[distances.argmin(-1)].to(torch.int8)


def pack(weight: Quantised) -> PackedMatrix:
    """Lay a quantised weight out in panels as ops/native/quantised.h says."""
    rows = -weight.outputs % PANEL
    values = F.pad(weight.values_FGK, (0, 0, 0, 0, 0, rows)).unflatten(-1, (16, 4))  # F G quads 4
    scales = F.pad(weight.scales_FG, (0, 0, 0, rows)).unflatten(0, (-1, 16)).transpose(1, 2)
    tiles = values.unflatten(0, (-1, 16)).permute(0, 2, 3, 1, 4)  # halves G quads 16 4
    if weight.format == "int4":
        codes = torch.bucketize(tiles.int().contiguous(), torch.tensor(LEVELS, dtype=torch.int32)).to(torch.uint8)
        tiles = codes[:, :, :8] | (codes[:, :, 8:] << 4)
    return PackedMatrix(weight.format, weight.outputs, weight.inputs, aligned_copy(tiles), aligned_copy(scales), GROUP)


def pack_quantised(weight_FD: torch.Tensor, format: str, place: Place = own_memory) -> PackedMatrix:
    """Round a weight (outputs, inputs) to 'int8' or 'int4' and lay it out, in one pass by our kernel."""
    weight_FD = weight_FD.detach().float().contiguous()
    outputs, inputs = weight_FD.shape
    halves, groups = -(-outputs // PANEL) * 2, -(-inputs // GROUP)
    values = place((halves, groups, 128 * BITS[format]), torch.uint8)
    scales = place((halves, groups, 16), torch.bfloat16)
    kernels.call("quantised_pack", weight_FD, outputs, inputs, FORMATS[format], values, scales)
    return PackedMatrix(format, outputs, inputs, values, scales, GROUP)


def pack_int8(weight_FD: torch.Tensor, place: Place = own_memory) -> PackedMatrix:
    """Round a weight to int8 and lay it out in panels."""
    return pack_quantised(weight_FD, "int8", place)


def pack_int4(weight_FD: torch.Tensor, place: Place = own_memory) -> PackedMatrix:
    """Round a weight to sixteen levels and lay it out in panels."""
    return pack_quantised(weight_FD, "int4", place)


def multiply(x_ND: torch.Tensor, weight: PackedMatrix, panels: tuple[int, int] | None = None) -> torch.Tensor:
    """Return x · weightᵀ, fp32 (N, outputs), by our kernel; with `panels`, only outputs 32 first .. 32 last - 1 are computed."""
    struct = weight.struct()
    first, last = panels or (0, struct.panels)
    out = torch.zeros(len(x_ND), struct.panels * PANEL)
    address = ctypes.addressof(struct)
    kernels.call("quantised_multiply", address, x_ND.float().contiguous(), len(x_ND), out, first, last)
    return out[:, : weight.outputs]


def slow_multiply(x_ND: torch.Tensor, weight: Quantised) -> torch.Tensor:
    """Return x · weightᵀ, fp32 (N, outputs): what `multiply` does, step by step, to the bit."""
    groups_NGK = _groups(x_ND.float())
    largest = groups_NGK.abs().amax(-1, keepdim=True)
    quants = (groups_NGK * torch.where(largest == 0, 0, 127.0 / largest)).round().clamp(-127, 127)
    scales_NG = largest[..., 0] / 127.0
    total = torch.zeros(len(x_ND), weight.outputs)
    for g in range(quants.shape[1]):
        sums = (quants[:, g].double() @ weight.values_FGK[:, g].double().T).float()  # integers below 2^24: exact
        scaled = sums * weight.scales_FG[:, g].float()
        # one rounding for product and sum, as the fused instruction has
        total = (total.double() + scaled.double() * scales_NG[:, g, None].double()).float()
    return total
