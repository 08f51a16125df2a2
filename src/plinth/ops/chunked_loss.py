"""Cross-entropy of the output head for GPUs: few large chunks, each one's element-wise work fused by the compiler."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 29  # logits in flight: 1 GB in bf16
SMALLEST_CHUNK = 128  # rows

Inner = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logits, targets) -> each row's loss, and the gradient of their sum in the logits' dtype."""


def losses_and_gradient(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's cross-entropy in nats, fp32, and the gradient of their sum in the logits' dtype.

    A target below zero gives 0 and no gradient. Compiled, it reads the logits and writes the gradient, nothing else.
    """
    log_probs_NV = torch.log_softmax(logits_NV.float(), -1)
    counted_N = (targets_N >= 0).float()
    wanted_N1 = targets_N.clamp_min(0)[:, None]
    losses_N = -log_probs_NV.gather(1, wanted_N1)[:, 0] * counted_N
    one_hot_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == wanted_N1
    grad_NV = (log_probs_NV.exp() - one_hot_NV.float()) * counted_N[:, None]
    return losses_N, grad_NV.to(logits_NV.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Inner:
    """Return `losses_and_gradient` compiled where the compiler for GPUs (Triton) is installed; it is with PyTorch on Linux."""
    return torch.compile(losses_and_gradient, fullgraph=True) if importlib.util.find_spec("triton") else losses_and_gradient


def chunk_rows(num_rows: int, vocab_size: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Return the rows of a chunk: the whole divided by a power of two, so that most chunks are of one size."""
    rows = num_rows
    while rows * vocab_size > elements and rows > SMALLEST_CHUNK:
        rows = -(-rows // 2)
    return rows


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, so that each chunk of logits lives once."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, elements, inner):
        wanted = hidden_ND.requires_grad or weight_VD.requires_grad
        grad_hidden = torch.empty_like(hidden_ND) if wanted else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        rows = chunk_rows(hidden_ND.shape[0], weight_VD.shape[0], elements)
        for start in range(0, hidden_ND.shape[0], rows):
            hidden, targets = hidden_ND[start : start + rows], targets_N[start : start + rows]
            losses, grad = inner(F.linear(hidden, weight_VD), targets)
            total += losses.sum(dtype=torch.float64)
            if wanted:
                torch.mm(grad, weight_VD, out=grad_hidden[start : start + rows])
                grad_weight += grad.t() @ hidden
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total.float()

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors  # no look at `grad`'s value: it would wait for the GPU
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


def chunked_cross_entropy(hidden_ND, weight_VD, targets_N, elements: int = CHUNK_ELEMENTS, inner: Inner | None = None) -> torch.Tensor:
    """Return what `ops.loss.linear_cross_entropy` returns, on any device, without waiting for it.

    `inner` gives losses and gradient of a chunk of logits in `losses_and_gradient`'s place.
    """
    inner = inner or (_compiled() if hidden_ND.device.type == "cuda" else losses_and_gradient)
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, elements, inner)
