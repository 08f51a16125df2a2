"""Root-mean-square normalisation, plain and fused with the residual sum before it."""

from __future__ import annotations

import torch

from plinth.ops import kernels


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Scale the last dimension to unit root mean square, times `weight`; computed in fp32, returned in x's dtype.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.  Differs: eps inside the root, as in Llama and Qwen3.
    """
    wide = x.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * weight


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x²) + eps) over the last dimension, kept, in x's dtype.

    The sum is taken in fp32; in bf16 only the result is rounded, which scales a whole row by at most one part in 256.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).float()
    return torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)


def rms_norm_backward(grad_y: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the input of y = x · scale, where scale is the inverse root mean square of x."""
    projection = (grad_y * y).sum(-1, keepdim=True).mul_(-1.0 / y.shape[-1])
    return torch.addcmul(grad_y, y, projection).mul_(scale)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, eps):
        ctx.has_delta, ctx.kernel = delta is not None, kernels.usable(x, delta)
        if ctx.kernel:
            return _add_rms_norm_kernel(ctx, x.contiguous(), delta, eps)
        total = x if delta is None else x + delta
        scale = inverse_rms(total, eps)
        y = total * scale
        ctx.save_for_backward(y, scale)
        if delta is None:
            return total.view_as(total), y
        return total, y

    @staticmethod
    def backward(ctx, grad_total, grad_y):
        y, scale = ctx.saved_tensors
        if ctx.kernel:
            grad = torch.empty_like(y)
            grad_total = None if grad_total is None else grad_total.contiguous()
            shape = (scale.numel(), y.shape[-1])
            kernels.call("add_rms_norm_backward", grad_total, grad_y.contiguous(), y, scale, grad, *shape)
        else:
            grad = rms_norm_backward(grad_y, y, scale)
            grad = grad if grad_total is None else grad.add_(grad_total)
        return grad, (grad if ctx.has_delta else None), None


def _add_rms_norm_kernel(ctx, x, delta, eps):
    y, scale = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    total = x.view_as(x) if delta is None else torch.empty_like(x)
    delta = None if delta is None else delta.contiguous()
    kernels.call("add_rms_norm_forward", x, delta, total, y, scale, scale.numel(), x.shape[-1], eps)
    ctx.save_for_backward(y, scale)
    return total, y


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + delta and its normalisation without a learnt scale, as one node of the gradient graph.

    The slow twin is `total = x + delta; rms_norm(total, None, eps)`; on a GPU, where the compiler fuses it, it is what runs.
    """
    if x.device.type != "cpu":
        total = x if delta is None else x + delta
        return total, rms_norm(total, None, eps)
    return _AddRMSNorm.apply(x, delta, eps)
