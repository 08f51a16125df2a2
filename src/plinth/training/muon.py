"""Muon's mathematics: the update is the momentum with its singular values moved to 1, found by matrix products alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from plinth.ops import kernels

Quintic = tuple[float, float, float]
"""(a, b, c) of the odd polynomial a x + b x³ + c x⁵."""

NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)
SMALLEST_SINGULAR_VALUE = 1e-3  # of a matrix of Frobenius norm 1, below which Polar Express promises nothing
CUSHION = 0.02407327424182761  # the paper's: no polynomial is fitted to values smaller than this share of the largest
SAFETY = 1.01  # room for rounding: a singular value somewhat above the interval must not blow up


def orthogonalise(matrices: torch.Tensor, quintics: tuple[Quintic, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Move the singular values of a stack of matrices (N, rows, columns) towards 1; returns the stack in `dtype`.

    Each polynomial costs three products: the Gram matrix G of the shorter side, a I + b G + c G², and that times the matrix.
    The identity rides inside the small matrix, so that each product is one plain batched call, and a tall matrix is
    multiplied from the right, so that nothing is transposed in memory.
    bf16 is enough where it is fast; a processor without units for it is many times faster in fp32.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    if takes_kernels(matrices, dtype):
        polynomials, result = torch.tensor(quintics, dtype=torch.float32), torch.empty(matrices.shape, dtype=dtype)
        for matrix, out in zip(matrices.contiguous(), result):
            kernels.call("orthogonalise", matrix, out, *matrix.shape, polynomials, len(quintics))
        return result
    x = matrices.to(dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    for a, b, c in quintics:
        gram = torch.bmm(x.transpose(1, 2), x) if tall else torch.bmm(x, x.transpose(1, 2))
        inner = gram * c
        inner.diagonal(dim1=1, dim2=2).add_(b)
        polynomial = torch.bmm(gram, inner)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)
    return x


def takes_kernels(matrices: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether our kernels do Muon's update of matrices (..., rows, columns), fp32, with iterations in `dtype`."""
    plain = type(matrices) is torch.Tensor and matrices.device.type == "cpu" and matrices.dtype is torch.float32
    whole = matrices.shape[-2] % 32 == 0 and matrices.shape[-1] % 32 == 0
    return plain and whole and dtype is torch.bfloat16 and kernels.library() is not None


def update_on_kernels(
    weight: torch.Tensor,
    grad: torch.Tensor,
    buffer: torch.Tensor,
    quintics: tuple[Quintic, ...],
    *,
    momentum: float,
    keep: float,
    rate: float,
) -> None:
    """Move the momentum, and then the weight to keep · weight - rate · (orthogonal update), in place; all are (rows, columns), fp32."""
    direction = torch.empty_like(grad)
    kernels.call("nesterov", grad, buffer, direction, grad.numel(), momentum)
    update = orthogonalise(direction[None], quintics)[0]
    kernels.call("move_weights", weight, update, weight.numel(), keep, rate)


def quintics(name: str, steps: int) -> tuple[Quintic, ...]:
    """Return the polynomials of `steps` iterations: newton-schulz, the same each time, or polar-express."""
    return polar_express(steps) if name == "polar-express" else (NEWTON_SCHULZ,) * steps


@lru_cache
def polar_express(steps: int) -> tuple[Quintic, ...]:
    """Return the polynomials whose composition is, step by step, nearest to 1 on the singular values that are left.

    Each is the best odd polynomial of degree 5 on the interval that the ones before it leave.
    Source: Amsel et al. 2025, arXiv:2505.16932, algorithm 1 with the cushion and the safety factor of its listing.
    """
    low, high, result = SMALLEST_SINGULAR_VALUE, 1.0, []
    for step in range(steps):
        a, b, c = _best_quintic(max(low, CUSHION * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        recentre = 2.0 / sum(ends)  # the cushion left the lower end out: put what both ends become about 1 again
        low, high = ends[0] * recentre, 2.0 - ends[0] * recentre
        safety = SAFETY if step < steps - 1 else 1.0
        result.append((recentre * a / safety, recentre * b / safety**3, recentre * c / safety**5))
    return tuple(result)


def _best_quintic(low: float, high: float) -> Quintic:
    """Return the odd polynomial of degree 5 nearest to 1 on [low, high] in the largest deviation (Remez' exchange)."""
    if low > (1.0 - 5e-6) * high:  # the limit of the exchange, which is ill-conditioned there: Newton-Schulz of order 5
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = (0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high)
    error = np.inf
    while True:
        points = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        a, b, c, deviation = np.linalg.solve(np.stack([points, points**3, points**5, signs], 1), np.ones(4))
        if abs(error - deviation) < 1e-15:
            return float(a), float(b), float(c)
        error = deviation
        squares = (-3 * b + np.array([-1.0, 1.0]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c)
        inner = tuple(np.sqrt(np.sort(squares)))
