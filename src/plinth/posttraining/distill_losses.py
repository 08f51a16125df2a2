"""Divergences between a teacher's and a student's distributions of the next token, in nats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from plinth.config import UserError
from plinth.ops.softcap import softcap

CHUNK_ELEMENTS = 1 << 21  # logits of each model in flight
CHUNK_ELEMENTS_GPU = 1 << 27
MEASURES = ("cross_entropy_nats", "teacher_cross_entropy_nats", "same_first_choice")


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


@dataclass(frozen=True)
class Head:
    """Hidden states and the matrix that makes logits of them."""

    hidden_ND: Tensor
    """states after the last norm; teacher and student may differ in D"""
    weight_VD: Tensor
    """output matrix"""
    cap: float | None = None
    """bound of the logits by a tanh, where the model has one"""

    def logits(self, part: slice, vocab_size: int) -> Tensor:
        """Return the logits of some rows, in fp32 at least, of the first `vocab_size` tokens."""
        logits = F.linear(self.hidden_ND[part], self.weight_VD[:vocab_size])
        return logits if logits.dtype == torch.float64 else logits.float()

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else softcap(logits, self.cap)


class _ChunkedDistillation(torch.autograd.Function):
    """Computes the gradient beside the loss, so that each chunk's two logits live once and are computed once."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, student: Head, teacher: Head, targets_N, rows: int, options):
        hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
        size = min(len(weight_VD), len(teacher.weight_VD))
        grad_hidden = torch.zeros_like(hidden_ND) if hidden_wanted else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32)) if weight_wanted else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=hidden_ND.device)
        for start in range(0, len(targets_N), rows):
            part = slice(start, start + rows)
            teacher_logits = teacher.capped(teacher.logits(part, size))
            logits = student.logits(part, size).requires_grad_(hidden_wanted or weight_wanted)
            with torch.enable_grad():
                capped = student.capped(logits)
                loss = distillation_loss(capped, teacher_logits, targets_N[part], **options)[0]
            total += loss.detach()
            sums += _measures(capped.detach(), teacher_logits, targets_N[part])
            if not logits.requires_grad:
                continue
            (grad,) = torch.autograd.grad(loss, logits)
            grad = grad.to(weight_VD.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight_VD[:size], out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight[:size] += grad.t() @ hidden_ND[part]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(sums)
        return total.to(torch.promote_types(hidden_ND.dtype, torch.float32)), sums

    @staticmethod
    def backward(ctx, grad, _):
        scaled = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


@torch.no_grad()
def _measures(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the sums of MEASURES over rows of logits whose target counts."""
    counted_N = targets_N >= 0
    wanted_N1 = targets_N.clamp(min=0)[:, None]
    values = [table.logsumexp(-1) - table.gather(1, wanted_N1)[:, 0] for table in (student_NV, teacher_NV)]
    values.append((student_NV.argmax(-1) == teacher_NV.argmax(-1)).to(student_NV.dtype))
    return torch.stack([torch.where(counted_N, value, 0.0).sum(dtype=torch.float64) for value in values])


def chunked_distillation_loss(
    student: Head, teacher: Head, targets_N: Tensor, *, rows: int | None = None, **options
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Return `distillation_loss` of two heads, its count and the sums of MEASURES.

    Only rows whose target counts go through the heads, and `rows` of them (default: about CHUNK_ELEMENTS logits) at a time, so two
    vocabularies' logits never stand in memory. Each is computed once: the gradient is taken beside the loss.
    Where one matrix has more rows than the other, which pads the vocabulary, both distributions are over the tokens of both.
    """
    places = (targets_N >= 0).nonzero()[:, 0]
    chosen = [replace(head, hidden_ND=head.hidden_ND[places]) for head in (student, teacher)]
    elements = CHUNK_ELEMENTS if targets_N.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    rows = rows or max(1, elements // len(student.weight_VD))
    hidden_ND, weight_VD = chosen[0].hidden_ND, chosen[0].weight_VD
    fixed = [replace(head, hidden_ND=head.hidden_ND.detach(), weight_VD=head.weight_VD.detach()) for head in chosen]
    total, sums = _ChunkedDistillation.apply(hidden_ND, weight_VD, *fixed, targets_N[places], rows, options)
    return total, len(places), dict(zip(MEASURES, sums))
