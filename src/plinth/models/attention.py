"""Causal self-attention of a decoder: grouped queries, and what of norms, rotation, window and caps its configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.models.kv_cache import PagedCache, View
from plinth.models.mlp import Linear
from plinth.models.norm import normalisation
from plinth.ops.attention import attend, attention_probabilities, has_kernel, kernel_attention, qk_norm_rope_attention
from plinth.ops.linear import linear_rows
from plinth.ops.rope import apply_rope
from plinth.ops.segments import Runs
from plinth.ops.shared_rows import SharedRows


class ValueEmbedding(nn.Module):
    """What a token's own embedding adds to its values, behind a gate a head that the first channels of attention's input open.

    Source: nanochat, after Zhou et al. 2024, arXiv:2410.17897 (value residual), and modded-nanogpt.
    Differs: the table starts at 0, so that the decoder begins as the one without; the gate starts at 1, as theirs.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.kv_dim)
        self.gate = nn.Linear(config.value_gate_channels, config.num_kv_heads, bias=False)

    def forward(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return what is added to the values of tokens (...) whose inputs to attention are x (..., D), shape (..., K, E)."""
        return self._gated(tokens, nn.functional.linear(x[..., : self.gate.in_features], self.gate.weight))

    def forward_rows(self, tokens_N: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        return self._gated(tokens_N, linear_rows(x_ND[:, : self.gate.in_features].contiguous(), self.gate.weight))

    def _gated(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # 2 sigmoid(score), written with the tanh: PyTorch's sigmoid rounds by the place of a number in the tensor, its tanh does not.
        opening = 1.0 + torch.tanh(0.5 * scores)
        return self.table(tokens).unflatten(-1, (self.gate.out_features, -1)) * opening[..., None]


class Attention(nn.Module):
    """Queries, keys and values come from one fused projection: H query heads, then K key heads, then K value heads."""

    def __init__(self, config: DecoderConfig, layer: int = 0):
        super().__init__()
        self.config = config
        self.slides = config.slides(layer)
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, config.out_bias)
        self.q_norm = normalisation(config, config.head_dim) if config.qk_norm else None
        self.k_norm = normalisation(config, config.head_dim) if config.qk_norm else None
        self.value_embed = ValueEmbedding(config) if config.has_value_embedding(layer) else None
        self.is_fused = is_fused(config)

    def forward(self, x_BTD: torch.Tensor, cos_TE, sin_TE, mask=None, tokens_BT=None, shared: SharedRows | None = None) -> torch.Tensor:
        """Attend causally within each sequence, or where the mask, (T, T) or (B, 1, T, T) or Runs, says; returns (B, T, D).

        Without rotary positions cos and sin are None. A value embedding needs the tokens. With `shared` x is rows of it, and the
        sequences attend that it stands for.
        Under tensor parallelism the projection gives this rank's heads only: its width says how many.
        """
        qkv = self._project(x_BTD, tokens_BT)
        if shared is not None:
            return self.out(shared.collapse(self._attended(shared.expand(qkv), cos_TE, sin_TE, mask)))
        return self.out(self._attended(qkv, cos_TE, sin_TE, mask))

    def _attended(self, qkv: torch.Tensor, cos_TE, sin_TE, mask) -> torch.Tensor:
        """Return what the heads (B, T, H + 2 K, E) read, (B, T, H E).

        Runs attend one at a time: what lies between segments costs nothing, and each takes the same kernels as a row of its own.
        """
        if isinstance(mask, Runs):
            parts = zip(qkv.flatten(0, 1).split(mask.lengths), mask.lengths)
            turned = [(part[None], *(None if x is None else x[:length] for x in (cos_TE, sin_TE)), None) for part, length in parts]
            return torch.cat([self._attended(*each)[0] for each in turned]).unflatten(0, qkv.shape[:2])
        config = self.config
        kv_heads = qkv.shape[-2] * config.num_kv_heads // (config.num_heads + 2 * config.num_kv_heads)
        heads = {"num_heads": qkv.shape[-2] - 2 * kv_heads, "num_kv_heads": kv_heads}
        if self.is_fused and mask is None and qkv.device.type == "cpu":
            return qk_norm_rope_attention(qkv, cos_TE, sin_TE, eps=config.norm_eps, **heads)
        if mask is None and takes_kernel(config, qkv):
            qkv = qkv if self.q_norm is None else torch.cat(self._normed(qkv, kv_heads), -2)
            return kernel_attention(qkv, cos_TE, sin_TE, scale=config.score_scale, **heads)
        q, k, v = (x.transpose(1, 2) for x in self._placed(qkv, kv_heads, cos_TE, sin_TE))
        y = attend(q, k, v, scale=config.score_scale, cap=config.attention_softcap, mask=mask)
        return y.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def weights(self, x_BTD: torch.Tensor, cos_TE, sin_TE, mask=None) -> torch.Tensor:
        """Return what each query of `forward` gives each key, fp32 (B, H, T, T), by plain softmax."""
        config, length = self.config, x_BTD.shape[1]
        q, k, _ = (x.transpose(1, 2) for x in self._placed(self._project(x_BTD), config.num_kv_heads, cos_TE, sin_TE))
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return attention_probabilities(q, k, scale=config.score_scale, cap=config.attention_softcap, mask=mask)

    def _project(self, x_BTD: torch.Tensor, tokens_BT=None) -> torch.Tensor:
        """Return queries, keys and values, (B, T, H + 2 K, E), neither normalised nor rotated; with tokens, values have their embedding."""
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        if self.value_embed is None or tokens_BT is None:
            return qkv
        return self._with_embedded_values(qkv, self.value_embed(tokens_BT, x_BTD))

    def _placed(self, qkv: torch.Tensor, kv_heads: int, cos, sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split heads (..., H + 2 K, E); normalise and rotate queries and keys as the configuration says. cos and sin lack the heads."""
        q, k, v = self._normed(qkv, kv_heads)
        if cos is not None:
            cos, sin = cos[..., None, :], sin[..., None, :]
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v

    def _normed(self, qkv: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split heads (..., H + 2 K, E); normalise queries and keys where the configuration asks for it."""
        q, k, v = qkv.split((qkv.shape[-2] - 2 * kv_heads, kv_heads, kv_heads), dim=-2)
        if self.q_norm is None or self.k_norm is None:
            return q, k, v
        return self.q_norm(q), self.k_norm(k), v

    def _with_embedded_values(self, qkv: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Return the heads (..., H + 2 K, E) with `added` (..., K, E) on the values, so that every way to attend takes them as they are."""
        queries_keys, values = qkv.split((self.config.num_heads + self.config.num_kv_heads, self.config.num_kv_heads), dim=-2)
        return torch.cat((queries_keys, values + added), -2)

    def forward_rows(self, x_ND, cos_NE, sin_NE, places_N, tokens_N, cache: PagedCache, layer: int, views: Sequence[View]):
        """Attend from N rows, each to the positions that its view shows; rows outside all views give zeros.

        A row's result does not depend on its company: projections run in fixed tiles, and every product of attention
        belongs to one sequence and one head alone.
        """
        config = self.config
        qkv = self.qkv.forward_rows(x_ND).unflatten(-1, (-1, config.head_dim))
        q, k, v = self._placed(qkv, config.num_kv_heads, cos_NE, sin_NE)
        if self.value_embed is not None:
            v = v + self.value_embed.forward_rows(tokens_N, x_ND)
        cache.write(layer, places_N, k, v)
        parts = [self._attend(q[view.rows], *cache.read(layer, view), view) for view in views]
        padding = x_ND.shape[0] - sum(part.shape[0] for part in parts)
        if padding:
            parts.append(x_ND.new_zeros(padding, config.num_heads * config.head_dim))
        return self.out.forward_rows(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _attend(self, q_NHE, keys_AKWE, values_AKWE, view: View) -> torch.Tensor:
        """Return (N, H * E); the queries that share a key head are stacked as rows of one product."""
        config = self.config
        K, E, R = config.num_kv_heads, config.head_dim, view.rows_per_group
        groups = config.num_heads // K
        q = q_NHE.view(-1, R, K, groups, E).permute(0, 2, 3, 1, 4).flatten(2, 3)  # A K (groups R) E
        mask = view.mask(self.slides)
        mask = mask if groups == 1 else mask.repeat(1, 1, groups, 1)
        if q.shape[0] * K == 1:  # a lone product may be split over threads and add in another order: never let it be lone
            q, keys_AKWE, values_AKWE = (x.expand(2, -1, -1, -1) for x in (q, keys_AKWE, values_AKWE))
        y = attend(q, keys_AKWE, values_AKWE, scale=config.score_scale, cap=config.attention_softcap, mask=mask)[: mask.shape[0]]
        return y.unflatten(2, (groups, R)).permute(0, 3, 1, 2, 4).reshape(-1, K * groups * E)


def takes_kernel(config: DecoderConfig, x: torch.Tensor) -> bool:
    """Return whether our kernel of causal attention does what a decoder asks for, with the type and the place of `x`; masks aside."""
    return config.attention_softcap is None and has_kernel(config.head_dim, x)


def is_fused(config: DecoderConfig) -> bool:
    """Return whether the operation of `ops.attention` that normalises, rotates and attends at once does what a decoder asks for."""
    plain_norm = config.qk_norm and config.norm == "rms" and not config.learnable_norm
    return plain_norm and config.position == "rope" and config.attention_softcap is None and config.query_scale is None
