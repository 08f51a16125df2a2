"""Causal self-attention with rotary positions, with QK-norm or without, as one differentiable operation.

On a processor with the units, a kernel of ours does all of it a head at a time and keeps nothing but a number a row for the
backward pass. Elsewhere every product is, with QK-norm, a batched matrix product of PyTorch's, and the probabilities are kept;
without it `attend` works. benchmarks/train_throughput.py measures the whole step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plinth.ops import kernels
from plinth.ops.norm import inverse_rms, rms_norm, rms_norm_backward
from plinth.ops.rope import apply_rope, swap_halves
from plinth.ops.softcap import softcap


class _FusedAttention(torch.autograd.Function):
    """Works head first: q, k, v have shape (heads · B, T, E), so that each product is one batched call."""

    @staticmethod
    def forward(ctx, qkv_BTGE, cos_TE, sin_TE, num_heads, num_kv_heads, eps):
        B, T, _, E = qkv_BTGE.shape
        rotated_heads = num_heads + num_kv_heads
        raw_GBTE = qkv_BTGE.permute(2, 0, 1, 3)
        qk_GBTE = raw_GBTE[:rotated_heads]
        scale_GBT1 = inverse_rms(qk_GBTE, eps)
        normed_GBTE = torch.empty(qk_GBTE.shape, dtype=qkv_BTGE.dtype)
        torch.mul(qk_GBTE, scale_GBT1, out=normed_GBTE)
        rotated_GBTE = (normed_GBTE * cos_TE).addcmul_(swap_halves(normed_GBTE), sin_TE)
        q = rotated_GBTE[:num_heads].view(num_heads * B, T, E)
        k = _repeat_heads(rotated_GBTE[num_heads:], num_heads)
        v = _repeat_heads(raw_GBTE[rotated_heads:].contiguous(), num_heads)
        future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu_(1)
        weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=E**-0.5).softmax(-1)
        y_HBTE = torch.bmm(weights, v).view(num_heads, B, T, E)
        ctx.save_for_backward(normed_GBTE, scale_GBT1, q, k, v, weights, cos_TE, sin_TE)
        ctx.heads = (num_heads, num_kv_heads)
        return y_HBTE.permute(1, 2, 0, 3).reshape(B, T, num_heads * E)

    @staticmethod
    def backward(ctx, grad_y):
        normed_GBTE, scale_GBT1, q, k, v, weights, cos_TE, sin_TE = ctx.saved_tensors
        num_heads, num_kv_heads = ctx.heads
        G, B, T, E = normed_GBTE.shape
        grad_o = grad_y.view(B, T, num_heads, E).permute(2, 0, 1, 3).reshape(num_heads * B, T, E)
        grad_v = torch.bmm(weights.transpose(1, 2), grad_o)
        grad_weights = torch.bmm(grad_o, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_rotated = torch.empty_like(normed_GBTE)
        torch.bmm(grad_scores, k, out=grad_rotated[:num_heads].view(num_heads * B, T, E))
        grad_rotated[num_heads:] = _sum_heads(torch.bmm(grad_scores.transpose(1, 2), q), num_kv_heads, B)
        grad_normed = (grad_rotated * cos_TE).addcmul_(swap_halves(grad_rotated), sin_TE, value=-1.0)
        grad_qkv = torch.empty((B, T, num_heads + 2 * num_kv_heads, E), dtype=grad_y.dtype)
        grad_GBTE = grad_qkv.permute(2, 0, 1, 3)
        grad_GBTE[:G] = rms_norm_backward(grad_normed, normed_GBTE, scale_GBT1 * E**-0.5)
        grad_GBTE[G:] = _sum_heads(grad_v, num_kv_heads, B)
        return grad_qkv, None, None, None, None, None


HEAD_DIMS = (32, 64, 96, 128)


class _KernelAttention(torch.autograd.Function):
    """The same on our kernel: queries and keys are normed and rotated again in the backward pass, and so are the scores.

    With eps None nothing is normed, with cos and sin None nothing rotated.
    """

    @staticmethod
    def forward(ctx, qkv_BTGE, cos_TE, sin_TE, num_heads, num_kv_heads, eps, scale):
        B, T, _, E = qkv_BTGE.shape
        qkv = qkv_BTGE.contiguous()
        cos, sin = (None if x is None else x.float().contiguous() for x in (cos_TE, sin_TE))
        y_BTD = torch.empty((B, T, num_heads * E), dtype=qkv.dtype)
        log_sums = torch.empty((B, num_heads, -(-T // 32) * 32), dtype=torch.float32)
        ctx.shape = (B, T, num_heads, num_kv_heads, E, eps is not None, eps or 0.0, scale)
        kernels.call("attention_forward", qkv, cos, sin, y_BTD, log_sums, *ctx.shape)
        ctx.save_for_backward(qkv, cos, sin, y_BTD, log_sums)
        return y_BTD

    @staticmethod
    def backward(ctx, grad_y):
        qkv, cos, sin, y_BTD, log_sums = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        kernels.call("attention_backward", qkv, cos, sin, y_BTD, grad_y.contiguous(), log_sums, grad_qkv, *ctx.shape)
        return grad_qkv, None, None, None, None, None, None


def _repeat_heads(x_KBTE: torch.Tensor, num_heads: int) -> torch.Tensor:
    K, B, T, E = x_KBTE.shape
    if num_heads == K:
        return x_KBTE.view(K * B, T, E)
    return x_KBTE[:, None].expand(K, num_heads // K, B, T, E).reshape(num_heads * B, T, E)


def _sum_heads(x: torch.Tensor, num_kv_heads: int, batch: int) -> torch.Tensor:
    _, T, E = x.shape
    grouped = x.view(num_kv_heads, -1, batch, T, E)
    return grouped[:, 0] if grouped.shape[1] == 1 else grouped.sum(1)


def attention_probabilities(q_BHTE, k_BKSE, *, scale: float, cap: float | None = None, mask=None) -> torch.Tensor:
    """Return the share of its attention that each query gives each key, fp32 (B, H, T, S), by plain products.

    The keys of K heads serve H queries' heads in groups. With a cap the scores are bounded by `ops.softcap` before the mask, which is
    True where a query may look, or is added to the scores.
    """
    k_BHSE = k_BKSE.repeat_interleave(q_BHTE.shape[1] // k_BKSE.shape[1], 1)
    scores = (q_BHTE @ k_BHSE.transpose(-1, -2)).float() * scale
    scores = scores if cap is None else softcap(scores, cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1)


def attend(q_BHTE, k_BKSE, v_BKSE, *, scale: float, cap: float | None = None, mask=None) -> torch.Tensor:
    """Return what the queries read of the values, (B, H, T, E): by PyTorch's attention, or with a cap by plain products.

    Without a mask each query sees the keys up to its own place; with one, what `attention_probabilities` says.
    """
    if cap is None:
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1]
        )
    if mask is None:
        mask = torch.ones(q_BHTE.shape[2], k_BKSE.shape[2], dtype=torch.bool, device=q_BHTE.device).tril()
    weights = attention_probabilities(q_BHTE, k_BKSE, scale=scale, cap=cap, mask=mask).to(v_BKSE.dtype)
    return weights @ v_BKSE.repeat_interleave(q_BHTE.shape[1] // v_BKSE.shape[1], 1)


def has_kernel(head_dim: int, x: torch.Tensor) -> bool:
    """Return whether our kernel attends with heads of this width, where they have the type and the place of `x`."""
    return head_dim in HEAD_DIMS and kernels.usable(x)


def kernel_attention(qkv_BTGE, cos_TE, sin_TE, *, num_heads: int, num_kv_heads: int, scale: float):
    """Rotate queries and keys, attend causally, on our kernel; returns (B, T, H·E). Without rotary positions cos and sin are None.

    `qkv_BTGE` is as `qk_norm_rope_attention` takes it, and `has_kernel`. The slow twin is `attend` after `apply_rope`.
    """
    return _KernelAttention.apply(qkv_BTGE, cos_TE, sin_TE, num_heads, num_kv_heads, None, scale)


def qk_norm_rope_attention(qkv_BTGE, cos_TE, sin_TE, *, num_heads: int, num_kv_heads: int, eps: float):
    """Normalise and rotate queries and keys, attend causally; returns (B, T, H·E).

    `qkv_BTGE` holds num_heads queries, then num_kv_heads keys, then as many values along G. The slow twin is
    `plain_qk_norm_rope_attention`.
    """
    if has_kernel(qkv_BTGE.shape[-1], qkv_BTGE):
        return _KernelAttention.apply(qkv_BTGE, cos_TE, sin_TE, num_heads, num_kv_heads, eps, qkv_BTGE.shape[-1] ** -0.5)
    cos_TE, sin_TE = cos_TE.to(qkv_BTGE.dtype), sin_TE.to(qkv_BTGE.dtype)
    return _FusedAttention.apply(qkv_BTGE, cos_TE, sin_TE, num_heads, num_kv_heads, eps)


def plain_qk_norm_rope_attention(
    qkv_BTGE, cos_TE, sin_TE, *, num_heads: int, num_kv_heads: int, eps: float, q_weight=None, k_weight=None, mask_B1TT=None
):
    """Do what `qk_norm_rope_attention` does with PyTorch's attention; takes the learnt scales of QK-norm.

    With `mask_B1TT`, True where a query may look, it takes the place of the causal mask; rotations may then differ by sequence (B, T, E).
    """
    q, k, v = qkv_BTGE.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    cos, sin = cos_TE[..., None, :], sin_TE[..., None, :]
    q = apply_rope(rms_norm(q, q_weight, eps), cos, sin)
    k = apply_rope(rms_norm(k, k_weight, eps), cos, sin)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask_B1TT).transpose(1, 2).flatten(2)
