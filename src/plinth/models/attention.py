"""Causal self-attention with grouped queries, QK-norm and rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.models.kv_cache import KVCache
from plinth.models.mlp import RMSNorm
from plinth.ops.rope import apply_rope


class Attention(nn.Module):
    """Queries, keys and values come from one fused projection: H query heads, then K key heads, then K value heads."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """Return q (..., H, E), k and v (..., K, E), the first two normalised and rotated."""
        config = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=-2)
        return apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin), v

    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x_BTD, cos, sin)
        grouped = self.config.num_heads != self.config.num_kv_heads
        y_BHTE = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped
        )
        return self.out(y_BHTE.transpose(1, 2).flatten(2))

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
