"""Cross-entropy of an output head whose rows are spread over processes: no process ever holds the others' logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 21  # logits in flight on a process


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, chunk by chunk; a chunk's processes exchange three numbers a token."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, first_row, group):
        losses_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        rows = max(1, CHUNK_ELEMENTS // max(1, weight_VD.shape[0]))
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            grad, losses_N[part] = _chunk(F.linear(hidden_ND[part], weight_VD).float(), targets_N[part], first_row, group)
            grad = grad.to(hidden_ND.dtype)
            torch.mm(grad, weight_VD, out=grad_hidden[part])
            grad_weight += grad.t() @ hidden_ND[part]
        dist.all_reduce(grad_hidden, group=group)  # each process knows its rows' share only
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return losses_N.sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


def _chunk(logits_NV, targets_N, first_row, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of these rows' logits, and the losses; both count only where the target is not below zero."""
    counted = targets_N >= 0
    local = targets_N - first_row
    here = counted & (local >= 0) & (local < logits_NV.shape[1])
    index = local.clamp(0, max(0, logits_NV.shape[1] - 1))[:, None]
    largest = logits_NV.amax(1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits_NV - largest[:, None]
    sums = torch.stack([torch.zeros_like(largest), shifted.gather(1, index)[:, 0] * here])
    powers = shifted.exp_()
    sums[0] = powers.sum(1)
    dist.all_reduce(sums, group=group)
    grad = powers.div_(sums[0][:, None])
    grad.scatter_add_(1, index, -here.to(grad.dtype)[:, None])
    return grad.mul_(counted[:, None]), (sums[0].log() - sums[1]) * counted


def vocab_parallel_cross_entropy(hidden_ND, weight_VD, targets_N, *, first_row: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the summed cross-entropy in nats of `targets_N` under softmax over all processes' rows: a fp32 scalar, alike on all.

    Each process passes its rows of the head, the first of which is row `first_row` of the whole, and the same hidden states and
    targets; targets below zero do not count. The slow twin is `plinth.ops.loss.linear_cross_entropy` with the whole head.
    Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 (cross-entropy without gathering the logits).
    """
    return _VocabParallelCrossEntropy.apply(hidden_ND, weight_VD, targets_N, first_row, group)


def spread_cross_entropy(hidden_ND: torch.Tensor, weight_VD: Any, targets_N: torch.Tensor) -> torch.Tensor:
    """Do `vocab_parallel_cross_entropy` for a head that is a DTensor cut by rows over a mesh of one dimension."""
    mesh = weight_VD.device_mesh
    first_row = mesh.get_local_rank() * -(-weight_VD.shape[0] // mesh.size())
    return vocab_parallel_cross_entropy(hidden_ND, weight_VD.to_local(), targets_N, first_row=first_row, group=mesh.get_group())
