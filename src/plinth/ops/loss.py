"""Cross-entropy of the output head that never holds all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plinth.ops import kernels
from plinth.ops.chunked_loss import chunk_rows, chunked_cross_entropy
from plinth.ops.linear import WeightGradient, collected, collecting, takes_rows
from plinth.ops.softcap import softcap, softcapped_cross_entropy
from plinth.ops.vocab_parallel import spread_cross_entropy

CHUNK_ELEMENTS = 1 << 21  # logits in flight, per thread: 4 MB in bf16
KEPT_ELEMENTS = 1 << 24  # logits kept from a forward to its backward pass, per thread: 64 MB in fp32
BIAS_BLOCK = 32  # columns that a matrix with a bias beside it is filled up to
SMALLEST = torch.finfo(torch.float32).tiny


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, so that each chunk of logits lives once."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        losses_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32)
        wanted = hidden_ND.requires_grad or weight_VD.requires_grad
        grad_hidden = torch.empty_like(hidden_ND) if wanted else None
        made = torch.empty if len(hidden_ND) else torch.zeros
        grad_weight = made(weight_VD.shape, dtype=torch.float32) if weight_VD.requires_grad else None
        rows = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            hidden, counted = hidden_ND[part], targets_N[part] >= 0
            targets = targets_N[part, None].clamp_min(0)
            grad = torch.softmax(F.linear(hidden, weight_VD), -1)  # the probabilities, soon minus the one-hot targets
            losses_N[part] = -grad.gather(1, targets)[:, 0].float().clamp_min(SMALLEST).log() * counted
            if wanted:
                grad.scatter_add_(1, targets, torch.full(targets.shape, -1.0, dtype=grad.dtype))
                if not counted.all():
                    grad.mul_(counted[:, None])
                torch.mm(grad, weight_VD, out=grad_hidden[part])
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), hidden, fresh=start == 0)
        if wanted:
            ctx.save_for_backward(grad_hidden)
            ctx.grad_weight, ctx.weight, ctx.sums = grad_weight, weight_VD, collecting(weight_VD)
        return losses_N.sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx, grad):
        (grad_hidden,), grad_weight = ctx.saved_tensors, ctx.grad_weight
        if grad != 1.0:
            grad_hidden, grad_weight = grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad if grad_weight is not None else None
        if ctx.sums is None or grad_weight is None:
            return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight.dtype), None
        ctx.sums.absorb(ctx.weight, grad_weight)
        return grad_hidden, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, fresh: bool = False) -> None:
    """Add the product of two matrices to an fp32 total, in one pass where they are of its type; a fresh total has no numbers yet."""
    if a.dtype == total.dtype and fresh:
        torch.mm(a, b, out=total)
    elif a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)  # not addmm_, which torch's counter of operations does not see
    elif fresh:
        total.copy_(a @ b)
    else:
        total += a @ b


class _KernelCrossEntropy(torch.autograd.Function):
    """The same on our kernels: one pass turns a chunk of logits into its gradient, and the loss is the fp32 logarithm of a sum."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, sums):
        (N, V), targets_N = (hidden_ND.shape[0], weight_VD.shape[0]), targets_N.contiguous()
        hidden_ND, losses_N = hidden_ND.contiguous(), torch.empty(N, dtype=torch.float32)
        wanted, weight_wanted = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        grad_hidden, gradient = torch.empty_like(hidden_ND), WeightGradient(weight_VD.shape)
        rows = min(N, max(32, CHUNK_ELEMENTS // V // 32 * 32))
        logits = torch.empty((rows, V), dtype=torch.bfloat16)
        for start in range(0, N, rows):
            part = slice(start, min(start + rows, N))
            hidden, chunk = hidden_ND[part], logits[: part.stop - start]
            torch.mm(hidden, weight_VD.t(), out=chunk)
            kernels.call("cross_entropy", chunk, targets_N[part], losses_N[part], *chunk.shape)
            if wanted:
                torch.mm(chunk, weight_VD, out=grad_hidden[part])
                if weight_wanted:
                    gradient.add(chunk, hidden)
        if wanted:
            ctx.save_for_backward(grad_hidden)
            ctx.gradient, ctx.sums = gradient if weight_wanted else None, sums
        return losses_N.sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx, grad):
        (grad_hidden,) = ctx.saved_tensors
        if grad != 1.0:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if ctx.gradient is None:
            return grad_hidden, None, None, None
        if ctx.sums is None:
            return grad_hidden, ctx.gradient.scaled(grad).rounded(), None, None
        ctx.sums.absorb(ctx.gradient.scaled(grad))
        return grad_hidden, None, None, None


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, cap: float | None = None
) -> torch.Tensor:
    """Return the summed cross-entropy in nats of `targets_N` under softmax(hidden · weightᵀ), a fp32 scalar.

    Targets below zero do not count. With a cap the logits are bounded by `ops.softcap` first.

    Without our kernels, in bf16, a token's loss carries the rounding of its probability, one part in 512, without bias, and a loss
    above 87 nats is cut there.  The slow twin is `F.cross_entropy(hidden @ weight.T, targets, ignore_index=-1, reduction="sum")`.
    """
    if cap is not None:
        assert not hasattr(weight_VD, "device_mesh"), "a decoder with a soft cap is not spread over processes"
        return softcapped_cross_entropy(hidden_ND, weight_VD, targets_N, cap)
    if hasattr(weight_VD, "device_mesh"):  # a DTensor: the head's rows are spread over processes
        return spread_cross_entropy(hidden_ND, weight_VD, targets_N)
    if hidden_ND.device.type != "cpu":
        return chunked_cross_entropy(hidden_ND, weight_VD, targets_N)
    if takes_rows(hidden_ND, weight_VD):
        sums = collected(weight_VD) if torch.is_grad_enabled() else None
        return _KernelCrossEntropy.apply(hidden_ND, weight_VD, targets_N, sums)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)


def biased_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy in nats under softmax(hidden · weightᵀ + bias), as `linear_cross_entropy` does without a bias.

    The bias goes in as one more column of the matrix, which a one in the hidden state reads; it costs a copy of the matrix. The columns
    are filled up to whole blocks, which our kernels need.
    """
    width = -(-(hidden_ND.shape[1] + 1) // BIAS_BLOCK) * BIAS_BLOCK
    fill = width - hidden_ND.shape[1] - 1
    ones_N1, zeros_NC = hidden_ND.new_ones(len(hidden_ND), 1), hidden_ND.new_zeros(len(hidden_ND), fill)
    wide_VC = torch.cat([weight_VD, bias_V[:, None], weight_VD.new_zeros(len(weight_VD), fill)], 1)
    return linear_cross_entropy(torch.cat([hidden_ND, ones_N1, zeros_NC], 1), wide_VC, targets_N)


class _TokenLogProbs(torch.autograd.Function):
    """Goes by chunks, and computes their logits anew for the gradient, but where they are few enough to be kept."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, temperature, entropy):
        fused = temperature == 1.0 and not entropy and takes_rows(hidden_ND, weight_VD)
        found_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        entropy_N = torch.empty_like(found_N) if entropy else None
        kept = []
        parts = _parts(hidden_ND, weight_VD)
        for part in parts:
            keeps = any(ctx.needs_input_grad) and (len(parts) == 1 or part.stop * len(weight_VD) <= KEPT_ELEMENTS)
            logits_NV = F.linear(hidden_ND[part], weight_VD)
            if fused:
                grad_NV = _fused_gradient(logits_NV, targets_N[part], found_N[part])
                found_N[part].neg_()
            else:
                logs_NV = torch.log_softmax(_cooled(logits_NV.float(), temperature), -1)
                found_N[part] = logs_NV.gather(1, targets_N[part, None].clamp_min(0))[:, 0] * (targets_N[part] >= 0)
                if entropy_N is not None:
                    entropy_N[part] = -(logs_NV.exp() * logs_NV).sum(-1)
                grad_NV = _minus_targets(logs_NV.exp_(), targets_N[part]) if keeps else logs_NV
            kept += [grad_NV] if keeps else []
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.options, ctx.kept, ctx.weight = (temperature, fused), kept, weight_VD
        ctx.sums = (collected if fused else collecting)(weight_VD) if any(ctx.needs_input_grad) else None
        if entropy_N is not None:
            ctx.mark_non_differentiable(entropy_N)
        return found_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        temperature, fused = ctx.options
        weight_wanted, grad_hidden = ctx.needs_input_grad[1], torch.empty_like(hidden_ND)
        grad_weight = None
        if weight_wanted and fused:
            sums = ctx.sums or WeightGradient(weight_VD.shape)
        elif weight_wanted:
            shape, device = weight_VD.shape, weight_VD.device
            grad_weight = ctx.sums.plain(ctx.weight) if ctx.sums else torch.zeros(shape, dtype=torch.float32, device=device)
        kept, ctx.kept = ctx.kept, []
        for number, part in enumerate(_parts(hidden_ND, weight_VD)):
            if number < len(kept):
                grad_NV, kept[number] = kept[number], None
            elif fused:
                grad_NV = _fused_gradient(F.linear(hidden_ND[part], weight_VD), targets_N[part], torch.empty(part.stop - part.start))
            else:
                logits_NV = _cooled(F.linear(hidden_ND[part], weight_VD).float(), temperature)
                grad_NV = _minus_targets(torch.softmax(logits_NV, -1), targets_N[part])
            grad_NV = grad_NV.mul_((grad_N[part] * (targets_N[part] >= 0) / -temperature)[:, None]).to(weight_VD.dtype)
            torch.mm(grad_NV, weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_NV.t(), hidden_ND[part])
            elif weight_wanted:
                sums.add(grad_NV, hidden_ND[part].contiguous())
        found = None  # where a step collects it
        if weight_wanted and ctx.sums is None:
            found = sums.rounded() if grad_weight is None else grad_weight.to(weight_VD.dtype)
        return grad_hidden, found, None, None, None


def _parts(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> list[slice]:
    """Return the chunks of rows: on a CPU small ones, on a GPU few large ones."""
    count, vocab_size = len(hidden_ND), len(weight_VD)
    rows = max(32, CHUNK_ELEMENTS // vocab_size // 32 * 32) if hidden_ND.device.type == "cpu" else max(1, chunk_rows(count, vocab_size))
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _cooled(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits_NV if temperature == 1.0 else logits_NV.div_(temperature)


def _fused_gradient(logits_NV: torch.Tensor, targets_N: torch.Tensor, losses_N: torch.Tensor) -> torch.Tensor:
    """Turn logits into the probabilities minus the one-hot targets, and write the cross-entropies; a target below 0 gives zeros."""
    kernels.call("cross_entropy", logits_NV, targets_N.contiguous(), losses_N, *logits_NV.shape)
    return logits_NV


def _minus_targets(probs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    wanted_N1 = targets_N[:, None].clamp_min(0)
    return probs_NV.scatter_add_(1, wanted_N1, torch.full(wanted_N1.shape, -1.0, device=probs_NV.device))


def token_log_probs(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """Return log-probabilities in nats of `targets_N`, fp32, shape (N,); differentiable, for preference losses.

    A target below zero gets 0. With a cap the logits are bounded by `ops.softcap` first.
    """
    return token_scores(hidden_ND, weight_VD, targets_N, cap)[0]


def token_scores(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    cap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probabilities in nats of `targets_N` with gradient, and where asked for the entropy in nats, without; fp32 (N,).

    The logits, bounded by `ops.softcap` where there is a cap, are divided by the temperature. All of them are never held at once, but
    with a cap. A target below zero gets 0.
    """
    if cap is None:
        return _TokenLogProbs.apply(hidden_ND, weight_VD, targets_N, temperature, entropy)
    logs_NV = torch.log_softmax(softcap(F.linear(hidden_ND, weight_VD).float(), cap) / temperature, -1)
    found_N = logs_NV.gather(1, targets_N[:, None].clamp_min(0))[:, 0] * (targets_N >= 0)
    return found_N, -(logs_NV.detach().exp() * logs_NV.detach()).sum(-1) if entropy else None
