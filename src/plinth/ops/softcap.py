"""Logits bounded by a tanh, and the cross-entropy of a head that bounds them."""

from __future__ import annotations

import torch

from plinth.ops.chunked_loss import chunked_cross_entropy, losses_and_gradient

CHUNK_ELEMENTS = 1 << 21  # logits in flight


def softcap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap · tanh(logits / cap), fp32: near the identity for small scores, never beyond ±cap.

    Source: Gemma team 2024, arXiv:2408.00118, section 2 (logit soft-capping).
    """
    return torch.tanh(logits.float() / cap) * cap


def softcapped_cross_entropy(hidden_ND, weight_VD, targets_N, cap: float, elements: int = CHUNK_ELEMENTS) -> torch.Tensor:
    """Return the summed cross-entropy in nats of `targets_N` under softmax(softcap(hidden · weightᵀ)), a fp32 scalar.

    Targets below zero do not count. At most about `elements` logits exist at once.
    The slow twin is `F.cross_entropy(softcap(hidden @ weight.T, cap), targets, ignore_index=-1, reduction="sum")`.
    """

    def capped_losses(logits_NV: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        capped_NV = softcap(logits_NV, cap)
        losses_N, grad_NV = losses_and_gradient(capped_NV, targets)
        return losses_N, (grad_NV * (1.0 - (capped_NV / cap).square())).to(logits_NV.dtype)  # the derivative of tanh

    return chunked_cross_entropy(hidden_ND, weight_VD, targets_N, elements, capped_losses)
