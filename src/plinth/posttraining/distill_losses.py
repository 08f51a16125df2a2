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
MEASURES = ("cross_entropy_nats", "teacher_cross_entropy_nats", "same_first_choice", "long_term_nats", "teacher_rest")
TAILS = ("bucket", "drop")


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
    returns_N: Tensor | None = None,
    **options: float,
) -> tuple[Tensor, int]:
    """Return (Σ (1−share) CE + share T² divergence, tokens) over the targets that are not negative; with `returns_N` plus Σ return × CE.

    The factor T² keeps the size of the gradient when the temperature changes; TRL and torchtune leave it out.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    apart_N = divergence(name, student_NV, teacher_NV, temperature=temperature, **options)
    return _with_targets(share * temperature**2 * apart_N, student_NV, targets_N, share, returns_N)


def _with_targets(loss_N: Tensor, student_NV: Tensor, targets_N: Tensor, share: float, returns_N: Tensor | None) -> tuple[Tensor, int]:
    """Return the sum and count over the targets that are not negative, the targets' own cross-entropy added by its weights."""
    counted_N = targets_N >= 0
    if share != 1 or returns_N is not None:
        weights = (1 - share) if returns_N is None else (1 - share) + returns_N
        loss_N = loss_N + weights * F.cross_entropy(student_NV, targets_N.clamp(min=-1), ignore_index=-1, reduction="none")
    return torch.where(counted_N, loss_N, 0.0).sum(), int(counted_N.sum())


@dataclass(frozen=True)
class TopTokens:
    """What a teacher said at each position, kept in a file: its most probable tokens, and how much the others have together."""

    ids_NK: Tensor
    """most probable first"""
    log_probs_NK: Tensor
    """theirs in nats, at the temperature of the divergence"""
    rest_N: Tensor
    """log-probability in nats of all others together, at that temperature"""
    target_log_probs_N: Tensor
    """log-probability in nats of the position's target, at temperature 1"""
    vocab_size: int
    """tokens that the distribution was over"""

    def rows(self, part: slice | Tensor) -> TopTokens:
        """Return some positions."""
        return replace(
            self, ids_NK=self.ids_NK[part], log_probs_NK=self.log_probs_NK[part], rest_N=self.rest_N[part],
            target_log_probs_N=self.target_log_probs_N[part],
        )  # fmt: skip


def top_distillation_loss(
    student_NV: Tensor,
    teacher: TopTokens,
    targets_N: Tensor,
    *,
    name: str = "forward_kl",
    temperature: float = 1.0,
    share: float = 1.0,
    tail: str = "bucket",
    **options: float,
) -> tuple[Tensor, int]:
    """Return `distillation_loss` of the teacher's K most probable tokens.

    Tail bucket: all other tokens are one more outcome, for teacher and student, so that both still add up to 1; any divergence. It is never
    above the one over the whole vocabulary. Tail drop: Σ p (log p − log q) over the K alone, of the forward KL (verl).
    """
    ids_NK = teacher.ids_NK.long()
    logs_NV = (student_NV / temperature).log_softmax(-1)
    student, stored = logs_NV.gather(1, ids_NK), teacher.log_probs_NK.to(logs_NV.dtype)
    if tail == "drop":
        if name != "forward_kl":
            raise UserError(f"tail=drop leaves a sum that is a divergence for forward_kl alone, not for {name!r}. Use tail=bucket.")
        apart_N = (stored.exp() * (stored - student)).sum(-1)
    else:
        others_NV = logs_NV.scatter(1, ids_NK, -torch.inf)
        student = torch.cat([student, others_NV.logsumexp(-1, keepdim=True)], 1)
        stored = torch.cat([stored, teacher.rest_N.to(logs_NV.dtype)[:, None]], 1)
        apart_N = DIVERGENCES[name](student, stored, **options)
    return _with_targets(share * temperature**2 * apart_N, student_NV, targets_N, share, None)


def later_returns(student_BT: Tensor, teacher_BT: Tensor, mask_BT: Tensor, *, normalised: bool = True) -> Tensor:
    """Return what follows each counted token is worth, Σ_{u>t} (log p − log q) over counted tokens, or its mean, (B, T), 0 elsewhere.

    Both are log-probabilities of the tokens that the student drew, without gradient. The gradient of KL(q ‖ p) of whole answers is the
    expectation of Σ_t ∇KL_t − (Σ_{u>t} (log p_u − log q_u)) ∇log q_t: the first, of one step, is computed over the whole vocabulary.
    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543, eq. 3 to 7.
    """
    counted_BT = mask_BT.to(student_BT.dtype)
    worth_BT = (teacher_BT - student_BT) * counted_BT
    later_BT = worth_BT.flip(1).cumsum(1).flip(1) - worth_BT
    if normalised:
        later_BT = later_BT / (counted_BT.flip(1).cumsum(1).flip(1) - counted_BT).clamp(min=1)
    return later_BT * counted_BT


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

    def rows(self, part: slice | Tensor) -> Head:
        """Return some positions."""
        return replace(self, hidden_ND=self.hidden_ND[part])

    @property
    def vocab_size(self) -> int:
        return len(self.weight_VD)


class _ChunkedDistillation(torch.autograd.Function):
    """Computes the gradient beside the loss, so that each chunk's two logits live once and are computed once."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, student: Head, teacher: Head | TopTokens, targets_N, returns_N, rows: int, options):
        hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
        size = min(len(weight_VD), teacher.vocab_size)
        grad_hidden = torch.zeros_like(hidden_ND) if hidden_wanted else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32)) if weight_wanted else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=hidden_ND.device)
        for start in range(0, len(targets_N), rows):
            part = slice(start, start + rows)
            returns = None if returns_N is None else returns_N[part]
            logits = student.logits(part, size).requires_grad_(hidden_wanted or weight_wanted)
            with torch.enable_grad():
                capped = student.capped(logits)
                loss, measured = _chunk_loss(capped, teacher.rows(part), targets_N[part], returns, size, options)
            total += loss.detach()
            sums += measured
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
        return *scaled, None, None, None, None, None, None


def _chunk_loss(
    student_NV: Tensor, teacher: Head | TopTokens, targets_N: Tensor, returns_N: Tensor | None, size: int, options
) -> tuple[Tensor, Tensor]:
    """Return the loss of some rows of the student's logits, and the sums of MEASURES over them."""
    if isinstance(teacher, TopTokens):
        loss = top_distillation_loss(student_NV, teacher, targets_N, **options)[0]
        return loss, _measures(
            student_NV.detach(), -teacher.target_log_probs_N, teacher.ids_NK[:, 0], targets_N, None, teacher.rest_N.exp()
        )
    teacher_NV = teacher.capped(teacher.logits(slice(None), size))
    loss = distillation_loss(student_NV, teacher_NV, targets_N, returns_N=returns_N, **options)[0]
    return loss, _measures(student_NV.detach(), _surprise(teacher_NV, targets_N), teacher_NV.argmax(-1), targets_N, returns_N, None)


def _surprise(table_NV: Tensor, targets_N: Tensor) -> Tensor:
    return table_NV.logsumexp(-1) - table_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]


@torch.no_grad()
def _measures(
    student_NV: Tensor, teacher_N: Tensor, first_N: Tensor, targets_N: Tensor, returns_N: Tensor | None, rest_N: Tensor | None
) -> Tensor:
    """Return the sums of MEASURES over rows of logits whose target counts."""
    own_N, none_N = _surprise(student_NV, targets_N), student_NV.new_zeros(len(student_NV))
    same_N = (student_NV.argmax(-1) == first_N).to(student_NV.dtype)
    values = [own_N, teacher_N, same_N, none_N if returns_N is None else returns_N * own_N, none_N if rest_N is None else rest_N]
    return torch.stack([torch.where(targets_N >= 0, value, 0.0).sum(dtype=torch.float64) for value in values])


def chunked_distillation_loss(
    student: Head, teacher: Head | TopTokens, targets_N: Tensor, *, returns_N: Tensor | None = None, rows: int | None = None, **options
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Return `distillation_loss` of two heads, or `top_distillation_loss` of one, its count and the sums of MEASURES that there are.

    Only rows whose target counts go through the heads, and `rows` of them (default: about CHUNK_ELEMENTS logits) at a time, so two
    vocabularies' logits never stand in memory. Each is computed once: the gradient is taken beside the loss.
    Where one matrix has more rows than the other, which pads the vocabulary, both distributions are over the tokens of both.
    """
    places = (targets_N >= 0).nonzero()[:, 0]
    student, teacher = student.rows(places), teacher.rows(places)
    elements = CHUNK_ELEMENTS if targets_N.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    rows = rows or max(1, elements // len(student.weight_VD))
    fixed = [
        each if isinstance(each, TopTokens) else replace(each, hidden_ND=each.hidden_ND.detach(), weight_VD=each.weight_VD.detach())
        for each in (student, teacher)
    ]
    returns = None if returns_N is None else returns_N[places]
    total, sums = _ChunkedDistillation.apply(student.hidden_ND, student.weight_VD, *fixed, targets_N[places], returns, rows, options)
    there = {"long_term_nats": returns_N is not None, "teacher_rest": isinstance(teacher, TopTokens)}
    return total, len(places), {name: value for name, value in zip(MEASURES, sums) if there.get(name, True)}
