"""Losses of single answers, each called desirable or not, as functions of summed log-probabilities; one value a row, shape (B,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def kto_reference_point(mismatched_B: Tensor, reference_mismatched_B: Tensor) -> Tensor:
    """Return max(0, mean log π/π_ref) over prompts with another prompt's answer, detached: KTO's estimate of the KL in nats.

    Source: Ethayarajh et al. 2024 (KTO), arXiv:2402.01306.
    """
    return (mismatched_B - reference_mismatched_B).mean().clamp(min=0).detach()


def kto(
    ratio_B: Tensor,
    desirable_B: Tensor,
    reference_point: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w₊(1 − σ(β(ratio − z))) where desirable, w₋(1 − σ(β(z − ratio))) elsewhere; z is the `reference_point`, ratio log π/π_ref.

    Source: Ethayarajh et al. 2024 (KTO), arXiv:2402.01306.
    """
    gain_B = beta * (ratio_B - reference_point)
    good_B, bad_B = 1 - torch.sigmoid(gain_B), 1 - torch.sigmoid(-gain_B)
    return torch.where(desirable_B.bool(), desirable_weight * good_B, undesirable_weight * bad_B)


def apo_zero_unpaired(ratio_B: Tensor, desirable_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """1 − σ(β ratio) where desirable, σ(β ratio) elsewhere: KTO with its reference point at 0.  Source: arXiv:2408.06266."""
    return kto(ratio_B, desirable_B, reference_point=0.0, beta=beta)


def bco(ratio_B: Tensor, desirable_B: Tensor, shift: Tensor | float = 0.0, *, beta: float = 0.1) -> Tensor:
    """−log σ(β ratio − δ) where desirable, −log σ(δ − β ratio) elsewhere; `shift` is δ, a running mean of both classes' rewards.

    Source: Jung et al. 2024 (BCO), arXiv:2404.04656.
    """
    reward_B = beta * ratio_B - shift
    return -F.logsigmoid(torch.where(desirable_B.bool(), reward_B, -reward_B))


UNPAIRED_LOSSES: dict[str, Callable[..., Tensor]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired, "bco": bco}
