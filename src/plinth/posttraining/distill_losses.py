"""Divergences between a teacher's and a student's distributions of the next token, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plinth.config import UserError


def forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log-probabilities, shape (N,): covers all that the teacher says.  Source: Hinton et al. 2015."""
    return _kl(teacher_NV, student_NV)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(student ‖ teacher) of log-probabilities, shape (N,): says nothing that the teacher does not.  Source: arXiv:2306.08543."""
    return _kl(student_NV, teacher_NV)


def symmetric_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Half the forward plus half the reverse KL, shape (N,)."""
    return 0.5 * (_kl(teacher_NV, student_NV) + _kl(student_NV, teacher_NV))


def generalised_jsd(student_NV: Tensor, teacher_NV: Tensor, *, beta: float = 0.5) -> Tensor:
    """β KL(teacher ‖ M) + (1−β) KL(student ‖ M), M = β teacher + (1−β) student, of log-probabilities, shape (N,).

    At β = 0 and 1, where this is 0 throughout, it is the forward and the reverse KL.
    Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649.  Differs: none; the ends are those that TRL takes.
    """
    if not 0 <= beta <= 1:
        raise UserError(f"beta={beta} is not in [0, 1]. 0 is the forward KL, 1 the reverse, 0.5 the Jensen-Shannon divergence.")
    if beta == 0:
        return forward_kl(student_NV, teacher_NV)
    if beta == 1:
        return reverse_kl(student_NV, teacher_NV)
    shares = torch.tensor([1 - beta, beta], dtype=student_NV.dtype, device=student_NV.device).log()
    mixture_NV = torch.logaddexp(student_NV + shares[0], teacher_NV + shares[1])
    return beta * _kl(teacher_NV, mixture_NV) + (1 - beta) * _kl(student_NV, mixture_NV)


def total_variation(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """½ Σ |p_teacher − p_student|, shape (N,), in [0, 1]."""
    return 0.5 * (student_NV.exp() - teacher_NV.exp()).abs().sum(-1)


def _kl(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    return F.kl_div(right_NV, left_NV, reduction="none", log_target=True).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jsd": generalised_jsd,
    "total_variation": total_variation,
}


def divergence(name: str, student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0, **options: float) -> Tensor:
    """Return the divergence called `name` of two rows of logits, both divided by `temperature`, shape (N,); the teacher is detached."""
    if name not in DIVERGENCES:
        raise UserError(f"divergence={name!r} is not one of {', '.join(DIVERGENCES)}.")
    if temperature <= 0:
        raise UserError(f"temperature={temperature} must be positive.")
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV.detach()))
    return DIVERGENCES[name](student, teacher, **options)


def distillation_loss(
    student_NV: Tensor,
    teacher_NV: Tensor,
    targets_N: Tensor,
    *,
    name: str = "forward_kl",
    temperature: float = 1.0,
    share: float = 1.0,
    **options: float,
) -> tuple[Tensor, int]:
    """Return (Σ (1−share) CE + share T² divergence, tokens) over the targets that are not negative.

    The factor T² keeps the size of the gradient when the temperature changes; TRL and torchtune leave it out.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    counted_N = targets_N >= 0
    loss_N = share * temperature**2 * divergence(name, student_NV, teacher_NV, temperature=temperature, **options)
    if share != 1:
        loss_N = loss_N + (1 - share) * F.cross_entropy(student_NV, targets_N.clamp(min=-1), ignore_index=-1, reduction="none")
    return torch.where(counted_N, loss_N, 0.0).sum(), int(counted_N.sum())


def chunked_distillation_loss(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], targets_N: Tensor, *, rows: int = 256, **options
) -> tuple[Tensor, int]:
    """`distillation_loss` of (hidden_ND, weight_VD) of both models: `rows` rows of both logits stand in memory at a time.

    Rows without a counted target are left out first; the backward pass computes each chunk's logits again.
    """
    places = (targets_N >= 0).nonzero()[:, 0]
    total = student[0].new_zeros(())

    def part_loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden, teacher[1])
        return distillation_loss(F.linear(hidden, weight), teacher_logits, targets, **options)[0]

    for part in places.split(rows):
        total = total + checkpoint(part_loss, student[0][part], student[1], teacher[0][part], targets_N[part], use_reentrant=False)
    return total, len(places)


def dft_loss(log_probs_N: Tensor) -> tuple[Tensor, int]:
    """Return (Σ −p log p with p detached, tokens): a finetuning loss that follows the surprising tokens less.

    Source: Wu et al. 2025 (DFT), arXiv:2508.05629.
    """
    return -(log_probs_N.detach().exp() * log_probs_N).sum(), log_probs_N.numel()
