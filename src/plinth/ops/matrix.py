"""Matrices packed for generation: read once and in order, a row's product the same bits in any company."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PANEL = 32  # outputs
STEP = 32  # inputs
HUGE_PAGE = 2 << 20  # bytes
FORMATS = {"bf16": 0, "int8": 1, "int4": 2}


class Matrix(ctypes.Structure):
    """What ops/native/matrix.h calls Matrix."""

    _fields_ = [
        ("format", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("panels", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("group", ctypes.c_int),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class PackedMatrix:
    """A weight (outputs, inputs) in the layout of a format."""

    format: str
    """a key of FORMATS"""
    outputs: int
    """rows of the weight"""
    inputs: int
    """columns of the weight"""
    values: torch.Tensor
    """packed numbers"""
    scales: torch.Tensor | None = None
    """of quantised numbers"""
    group: int = 0
    """inputs that share a scale; 0 for bf16"""

    @property
    def bytes(self) -> int:
        """Memory that it takes and that a row reads."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.scales) if t is not None)

    def struct(self) -> Matrix:
        """Return it as C reads it; valid while this object lives."""
        return Matrix(
            FORMATS[self.format], self.outputs, self.inputs, -(-self.outputs // PANEL), -(-self.inputs // STEP), self.group,
            self.values.data_ptr(), None if self.scales is None else self.scales.data_ptr(),
        )  # fmt: skip


Place = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""(shape, dtype) → memory for a tensor, beginning at a multiple of 64 bytes, as torch's own allocations on the CPU do."""


def own_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return memory of its own."""
    memory = torch.empty(shape, dtype=dtype)
    assert memory.data_ptr() % 64 == 0
    return memory


def pack_bf16(weight_FD: torch.Tensor, place: Place = own_memory) -> PackedMatrix:
    """Round a weight to bf16 and lay it out in panels: (panels, steps, 2 halves, 16 pairs of inputs, 16 outputs, 2)."""
    outputs, inputs = weight_FD.shape
    padding = (0, -inputs % STEP, 0, -outputs % PANEL)
    padded = F.pad(weight_FD.detach(), padding) if any(padding) else weight_FD.detach()
    tiles = padded.view(-1, 2, 16, padded.shape[1] // STEP, 16, 2).permute(0, 3, 1, 4, 2, 5)
    return PackedMatrix("bf16", outputs, inputs, place(tiles.shape, torch.bfloat16).copy_(tiles))


def aligned_copy(values: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy in memory of its own."""
    return own_memory(values.shape, values.dtype).copy_(values)


class Stretch:
    """One stretch of memory for matrices, one behind the other, in huge pages where the system gives them.

    Reading a stream, a core waits for the address of every new page; huge ones are few. Weights are packed right into it: a page that
    is touched for the first time costs more than the copying. What is asked for and not used takes no memory.
    """

    def __init__(self, most_bytes: int):
        self._map = mmap.mmap(-1, most_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # a kernel without them
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._room = torch.frombuffer(self._map, dtype=torch.uint8)
        self._at = -self._room.data_ptr() % HUGE_PAGE

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the next place for a tensor."""
        size = math.prod(shape) * dtype.itemsize
        place = self._room[self._at : self._at + size]
        assert place.nbytes == size, "the stretch is full"
        self._at += -(-size // 64) * 64
        return place.view(dtype).view(shape)


def most_packed_bytes(weights: Sequence[torch.Tensor]) -> int:
    """Return a bound on what weights take packed in any format, for a Stretch."""
    return sum(2 * (len(weight) + 64) * (weight.shape[1] + 128) + 256 for weight in weights)
