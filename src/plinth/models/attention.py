"""Causal self-attention with grouped queries, QK-norm and rotary positions."""

from __future__ import annotations

import torch
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.models.kv_cache import KVCache
from plinth.models.mlp import RMSNorm
from plinth.ops.attention import plain_qk_norm_rope_attention, qk_norm_rope_attention
from plinth.ops.rope import apply_rope


class Attention(nn.Module):
    """Queries, keys and values come from one fused projection: H query heads, then K key heads, then K value heads."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, config.learnable_norm)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, config.learnable_norm)

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """Return q (..., H, E), k and v (..., K, E), the first two normalised and rotated; cos and sin are (..., E)."""
        config = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=-2)
        cos, sin = cos[..., None, :], sin[..., None, :]
        return apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin), v

    def forward(self, x_BTD: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
        """Attend causally within each sequence; returns (B, T, D)."""
        config = self.config
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, config.head_dim))
        shape = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "eps": config.norm_eps}
        if config.learnable_norm or x_BTD.device.type != "cpu":
            scales = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
            return self.out(plain_qk_norm_rope_attention(qkv, cos_TE, sin_TE, **shape, **scales))
        return self.out(qk_norm_rope_attention(qkv, cos_TE, sin_TE, **shape))

    def forward_rows(self, x_ND, cos, sin, positions_N, slots_N, cache: KVCache, layer: int) -> torch.Tensor:
        """Attend from N independent rows, each to positions 0..positions_N[i] of its slot.

        Every reduction runs over the whole window of the cache, so a row's result does not depend on its company.
        """
        q_NHE, k_NKE, v_NKE = self.project(x_ND, cos, sin)
        cache.write(layer, slots_N, positions_N, k_NKE, v_NKE)
        keys_NSKE, values_NSKE = cache.keys[layer][slots_N], cache.values[layer][slots_N]
        config = self.config
        q_NKGE = q_NHE.unflatten(1, (config.num_kv_heads, -1))
        scores_NKGS = torch.matmul(q_NKGE, keys_NSKE.permute(0, 2, 3, 1)).float() * config.head_dim**-0.5
        future_NS = torch.arange(cache.max_seq_len, device=x_ND.device) > positions_N[:, None]
        weights_NKGS = scores_NKGS.masked_fill(future_NS[:, None, None], -torch.inf).softmax(-1).to(x_ND.dtype)
        y_NKGE = torch.matmul(weights_NKGS, values_NSKE.transpose(1, 2))
        return self.out(y_NKGE.flatten(1))
