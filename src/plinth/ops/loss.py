"""Cross-entropy of the output head that never holds all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plinth.ops import kernels
from plinth.ops.chunked_loss import chunked_cross_entropy
from plinth.ops.linear import WeightGradient, collected, takes_rows
from plinth.ops.softcap import softcap, softcapped_cross_entropy
from plinth.ops.vocab_parallel import spread_cross_entropy

CHUNK_ELEMENTS = 1 << 21  # logits in flight, per thread: 4 MB in bf16
BIAS_BLOCK = 32  # columns that a matrix with a bias beside it is filled up to
SMALLEST = torch.finfo(torch.float32).tiny


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, so that each chunk of logits lives once."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        losses_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32)
        wanted = hidden_ND.requires_grad or weight_VD.requires_grad
        grad_hidden = torch.empty_like(hidden_ND) if wanted else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32) if wanted else None
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
                grad_weight += grad.t() @ hidden
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return losses_N.sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad != 1.0:
            grad_hidden, grad_weight = grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None


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
        sums = collected(weight_VD) if weight_VD.requires_grad and torch.is_grad_enabled() else None
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


def token_log_probs(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """Return log-probabilities in nats of `targets_N`, fp32, shape (N,); differentiable, for preference losses.

    A target below zero gets 0. With a cap the logits are bounded by `ops.softcap` first.
    """
    logits = F.linear(hidden_ND, weight_VD).float()
    logits = logits if cap is None else softcap(logits, cap)
    return -F.cross_entropy(logits, targets_N, ignore_index=-1, reduction="none")
