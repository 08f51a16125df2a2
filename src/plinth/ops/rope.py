"""Rotary position embedding in Hugging Face's half-split layout."""

from __future__ import annotations

import torch


def rope_table(positions: torch.Tensor, head_dim: int, theta: float, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and signed sines, fp32, shape (*positions.shape, head_dim).

    The sines of the first half carry the minus sign of the rotation, so that rotating takes two products and a sum.
    Both are multiplied by `scale`: rotated queries and keys grow by it, and their products by its square.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; half-split pairing as in GPT-NeoX.
    """
    return rotation_table(positions, rope_frequencies(head_dim, theta, positions.device), scale)


def rope_frequencies(head_dim: int, theta: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the angle a position of each pair of a head's channels, fp32 (head_dim / 2,), falling."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def rotation_table(positions: torch.Tensor, frequency: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `rope_table` returns, for frequencies of any kind."""
    angle = positions.float()[..., None] * frequency
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


class _Rotate(torch.autograd.Function):
    """x cos + swapped x sin with as few passes over memory as that takes, forward and back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half, wide = x.shape[-1] // 2, x.to(cos.dtype)
    y = wide * cos
    y[..., :half].addcmul_(wide[..., half:], sin[..., :half])
    y[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return y.to(x.dtype)


def swap_halves(x: torch.Tensor) -> torch.Tensor:
    """Exchange the two halves of the last dimension."""
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), -1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension of `x`; cos and sin broadcast against it and set the precision of the product."""
    if x.requires_grad and x.device.type == "cpu":
        return _Rotate.apply(x, cos, sin)
    return (x * cos + swap_halves(x) * sin).to(x.dtype)  # fused on a GPU; in decoding a row's bits must not depend on its place
