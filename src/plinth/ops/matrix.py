"""Matrices packed for generation: read once and in order, a row's product the same bits in any company."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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


def pack_bf16(weight_FD: torch.Tensor) -> PackedMatrix:
    """Round a weight to bf16 and lay it out in panels: (panels, steps, 2 halves, 16 pairs of inputs, 16 outputs, 2)."""
    outputs, inputs = weight_FD.shape
    padded = F.pad(weight_FD.detach().bfloat16(), (0, -inputs % STEP, 0, -outputs % PANEL))
    tiles = padded.view(-1, 2, 16, padded.shape[1] // STEP, 16, 2).permute(0, 3, 1, 4, 2, 5)
    return PackedMatrix("bf16", outputs, inputs, aligned_copy(tiles))


def aligned_copy(values: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy whose memory begins at a multiple of 64 bytes, as torch's own allocations on the CPU do."""
    copy = torch.empty(values.shape, dtype=values.dtype).copy_(values)
    assert copy.data_ptr() % 64 == 0
    return copy


def gathered(matrices: Sequence[PackedMatrix]) -> Iterator[PackedMatrix]:
    """Yield the matrices moved to one stretch of memory, in this order, in huge pages where the system gives them.

    Reading a stream, a core waits for the address of every new page; huge ones are few.
    """
    tensors = [t for matrix in matrices for t in (matrix.values, matrix.scales) if t is not None]
    memory = mmap.mmap(-1, sum(_whole_lines(t) for t in tensors) + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    at = -room.data_ptr() % HUGE_PAGE

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        nonlocal at
        if tensor is None:
            return None
        place = room[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        at += _whole_lines(tensor)
        return place.copy_(tensor)

    for matrix in matrices:
        yield replace(matrix, values=moved(matrix.values), scales=moved(matrix.scales))


def _whole_lines(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // 64) * 64
