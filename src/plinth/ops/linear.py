"""Linear layers: for training with our own product for the weights' gradient, for generation row by row.

A row of `linear_rows` does not depend on how many other rows share the call.

A matrix library picks its kernel, and with it the order of additions, by the number of rows: the same row can round
differently alone and in a batch. Here rows always pass in tiles of ROW_TILE; a wider call is made only where this
machine's kernel was seen to give the very same bits as the tiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from plinth.ops import kernels

ROW_TILE = 16
WIDEST_TILE = 256


class WeightGradient:
    """The gradient of a matrix (F, D), summed in fp32 over any number of blocks of rows."""

    def __init__(self, shape: torch.Size):
        self._shape, self._transposed = shape, shape[0] > shape[1]
        self._sums: torch.Tensor | None = None

    def add(self, grad_NF: torch.Tensor, x_ND: torch.Tensor) -> None:
        """Add gradᵀ · x; the operand with fewer columns is the one that the kernel transposes."""
        left, right = (x_ND, grad_NF) if self._transposed else (grad_NF, x_ND)
        fresh = self._sums is None
        if fresh:
            self._sums = torch.empty(left.shape[1], right.shape[1], dtype=torch.float32)
        kernels.call("add_products", left, right, *left.shape, right.shape[1], self._sums, int(fresh))

    @property
    def is_empty(self) -> bool:
        """Return whether nothing has been added."""
        return self._sums is None

    def scaled(self, factor: torch.Tensor) -> WeightGradient:
        """Return the sums times a scalar; a factor of 1 costs nothing."""
        if factor == 1.0:
            return self
        other = WeightGradient(self._shape)
        other._sums = self._sums * factor
        return other

    def absorb(self, other: WeightGradient) -> None:
        """Add the sums of `other`, which may not be used any more."""
        self._sums = other._sums if self._sums is None else self._sums.add_(other._sums)

    def rounded(self) -> torch.Tensor:
        """Return the sums in bf16, shape (F, D)."""
        gradient = torch.empty(self._shape, dtype=torch.bfloat16)
        kernels.call("round_sums", self._sums, gradient, *self._shape, int(self._transposed))
        return gradient

    @staticmethod
    def gather(parts: Sequence[WeightGradient], gradient: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of the parts, fp32, shape (F, D), added to `gradient`, in place, where there is one."""
        first = parts[0]
        out = torch.empty(first._shape, dtype=torch.float32) if gradient is None else gradient
        addresses = (ctypes.c_void_p * len(parts))(*(part._sums.data_ptr() for part in parts))
        kernels.call("gather_sums", addresses, len(parts), out, *first._shape, int(first._transposed), int(gradient is not None))
        return out


class GradientSums:
    """The gradients of one thread's weights, summed over its backward passes where they arise.

    Between `collect_gradients` and its end autograd gets no gradient of the matrices that the kernels sum: rounding them to the
    model's dtype for every micro-batch, only to add them up again, would be four passes over all weights.
    """

    def __init__(self) -> None:
        self._by_weight: dict[int, WeightGradient] = {}
        self._plain: dict[int, torch.Tensor] = {}

    def of(self, weight_FD: torch.Tensor) -> WeightGradient:
        """Return the sums that belong to a weight."""
        if id(weight_FD) not in self._by_weight:
            self._by_weight[id(weight_FD)] = WeightGradient(weight_FD.shape)
        return self._by_weight[id(weight_FD)]

    def plain(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the sums of a weight in its own layout, fp32, to be added to in place."""
        if id(weight) not in self._plain:
            self._plain[id(weight)] = torch.zeros(weight.shape, dtype=torch.float32)
        return self._plain[id(weight)]

    def absorb(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a gradient, fp32, to the sums of a weight in its own layout; it may not be used any more."""
        if id(weight) in self._plain:
            self._plain[id(weight)].add_(gradient)
        else:
            self._plain[id(weight)] = gradient

    def filled_plain(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Return the sums of a weight in its own layout in a list, which is empty if nothing was added."""
        return [self._plain[id(weight)]] if id(weight) in self._plain else []

    def filled(self, weight: torch.Tensor) -> list[WeightGradient]:
        """Return the sums of a weight in a list, which is empty if nothing was added."""
        found = self._by_weight.get(id(weight))
        return [found] if found is not None and not found.is_empty else []


_thread = threading.local()


@contextlib.contextmanager
def collect_gradients() -> Iterator[GradientSums]:
    """Let the kernels keep the sums of weights' gradients of this thread, to be taken up by `WeightGradient.gather`."""
    _thread.sums = GradientSums()
    try:
        yield _thread.sums
    finally:
        _thread.sums = None


def collecting(weight: torch.Tensor) -> GradientSums | None:
    """Return this thread's sums where they take a weight's gradient: within `collect_gradients`, of a parameter on a CPU.

    What is computed from parameters needs its gradient in autograd, which hands it on.
    """
    takes = weight.requires_grad and weight.is_leaf and weight.device.type == "cpu" and not hasattr(weight, "device_mesh")
    return getattr(_thread, "sums", None) if takes else None


def collected(weight_FD: torch.Tensor) -> WeightGradient | None:
    """Return where this thread collects the gradient of a weight for the kernels; None where it goes to autograd."""
    sums = collecting(weight_FD)
    return None if sums is None else sums.of(weight_FD)


class _KernelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_FD, sums):
        ctx.save_for_backward(x, weight_FD)
        ctx.sums = sums
        return F.linear(x, weight_FD)

    @staticmethod
    def backward(ctx, grad):
        x, weight_FD = ctx.saved_tensors
        x_ND, grad_NF = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.mm(grad_NF, weight_FD).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        sums = ctx.sums or WeightGradient(weight_FD.shape)
        sums.add(grad_NF.contiguous(), x_ND.contiguous())
        return grad_x, None if ctx.sums else sums.rounded(), None


def takes_rows(x: torch.Tensor, weight_FD: torch.Tensor) -> bool:
    """Return whether the kernel for a weight's gradient takes these: whole blocks of 32 in every direction."""
    rows = x.numel() // x.shape[-1]
    return not (rows % 32 or weight_FD.shape[0] % 32 or weight_FD.shape[1] % 32) and kernels.usable(x, weight_FD)


def linear(x: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """Return x · weightᵀ + bias, shape (..., F).  The slow twin is torch.nn.functional.linear."""
    if torch.is_grad_enabled() and takes_rows(x, weight_FD):
        y = _KernelLinear.apply(x, weight_FD, collected(weight_FD))
        return y if bias_F is None else y + bias_F
    return F.linear(x, weight_FD, bias_F)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VD, tokens, sums):
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.sums = weight_VD, sums
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx, grad):
        (tokens,) = ctx.saved_tensors
        ctx.sums.plain(ctx.weight).index_add_(0, tokens.flatten(), grad.reshape(-1, grad.shape[-1]).float())
        return None, None, None


def embedding(tokens: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Return the rows of a table that tokens name, shape (..., D).  The slow twin is torch.nn.functional.embedding.

    Within `collect_gradients` a backward pass touches the rows that were read, not a table of zeros as large as the weight.
    """
    sums = collecting(weight_VD)
    return F.embedding(tokens, weight_VD) if sums is None else _Embedding.apply(weight_VD, tokens, sums)


def pad_rows(count: int) -> int:
    """Return the smallest multiple of ROW_TILE that holds `count` rows."""
    return -(-count // ROW_TILE) * ROW_TILE


def linear_rows(x_ND: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """Return x · weightᵀ + bias, (N, F), each row bit for bit as in any other company; N is a multiple of ROW_TILE."""
    if bias_F is not None:
        return linear_rows(x_ND, weight_FD) + bias_F
    num_rows = x_ND.shape[0]
    if num_rows == ROW_TILE:
        return F.linear(x_ND, weight_FD)
    assert num_rows % ROW_TILE == 0, f"{num_rows} rows are not whole tiles of {ROW_TILE}"
    kind = (*weight_FD.shape, weight_FD.dtype, weight_FD.device, torch.get_num_threads())
    parts, start = [], 0
    while start < num_rows:
        width = WIDEST_TILE
        while width > ROW_TILE and (width > num_rows - start or not gives_same_bits(width, *kind)):
            width //= 2
        parts.append(F.linear(x_ND[start : start + width], weight_FD))
        start += width
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=1024)
def gives_same_bits(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, num_threads: int) -> bool:
    """Try whether one call with `rows` rows equals calls with ROW_TILE rows, bit for bit, on random numbers.

    Which kernel runs depends on the shape, the dtype and the threads, never on the numbers; a kernel that adds in
    another order differs in some of rows x out_features random results.
    """
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(rows, in_features, generator=generator).to(device, dtype)
    weight_FD = torch.randn(out_features, in_features, generator=generator).to(device, dtype)
    tiles = torch.cat([F.linear(tile, weight_FD) for tile in x_ND.split(ROW_TILE)])
    return torch.equal(F.linear(x_ND, weight_FD), tiles)
