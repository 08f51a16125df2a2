"""Logits bounded by a tanh, and the cross-entropy of a head that bounds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plinth.ops.chunked_loss import chunk_rows, losses_and_gradient

CHUNK_ELEMENTS = 1 << 21  # logits in flight


def softcap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap · tanh(logits / cap), fp32: near the identity for small scores, never beyond ±cap.

    Source: Gemma team 2024, arXiv:2408.00118, section 2 (logit soft-capping).
    """
    return torch.tanh(logits.float() / cap) * cap


class _SoftcappedCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, so that each chunk of logits lives once."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, cap, elements):
        wanted = hidden_ND.requires_grad or weight_VD.requires_grad
        grad_hidden = torch.empty_like(hidden_ND) if wanted else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        rows = chunk_rows(hidden_ND.shape[0], weight_VD.shape[0], elements)
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            capped = softcap(F.linear(hidden_ND[part], weight_VD), cap)
            losses, grad = losses_and_gradient(capped, targets_N[part])
            total += losses.sum(dtype=torch.float64)
            if wanted:
                grad = (grad * (1.0 - (capped / cap).square())).to(weight_VD.dtype)  # the derivative of tanh
                torch.mm(grad, weight_VD, out=grad_hidden[part])
                grad_weight += grad.t() @ hidden_ND[part]
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total.float()

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


def softcapped_cross_entropy(hidden_ND, weight_VD, targets_N, cap: float, elements: int = CHUNK_ELEMENTS) -> torch.Tensor:
    """Return the summed cross-entropy in nats of `targets_N` under softmax(softcap(hidden · weightᵀ)), a fp32 scalar.

    Targets below zero do not count. At most about `elements` logits exist at once.
    The slow twin is `F.cross_entropy(softcap(hidden @ weight.T, cap), targets, ignore_index=-1, reduction="sum")`.
    """
    return _SoftcappedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, cap, elements)
