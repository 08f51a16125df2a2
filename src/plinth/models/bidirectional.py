"""What encoders, encoder-decoders and vision towers share: linear layers with a bias, layer normalisation, plain multi-head attention.

Attention here sees every position that its mask shows: over one sequence (self-attention), or from one over another (cross-attention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from plinth.ops.linear import linear, takes_rows

SHORT = 256  # positions up to which bf16 attention trains faster as plain products on a CPU


class BiasedLinear(nn.Linear):
    """A matrix with an optional bias, multiplied by `plinth.ops.linear` where its kernel takes the shapes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and takes_rows(x, self.weight):
            y = linear(x, self.weight)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Zero mean and unit variance over the last dimension, times a learnt scale, plus a learnt shift; computed in fp32.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = True):
        super().__init__(size, eps, bias=bias)


class MultiHeadAttention(nn.Module):
    """Attention of H heads without positions of its own; for self-attention queries, keys and values are one fused projection.

    Parameters: `qkv` (H·E queries, H·E keys, H·E values) for self-attention, `q` and `kv` for cross-attention; `out`.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        out_bias: bool | None = None,
        cross: bool = False,
        context_size: int | None = None,
        scale: float | None = None,
    ):
        """`head_dim` is hidden_size / num_heads where left out, `out_bias` is `bias`, and `scale` is 1/sqrt(head_dim).

        With `cross` the keys and values are those of a context, whose width is `context_size` (default: hidden_size).
        """
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim or hidden_size // num_heads
        self.scale = self.head_dim**-0.5 if scale is None else scale
        width = num_heads * self.head_dim
        if cross:
            self.q = BiasedLinear(hidden_size, width, bias=bias)
            self.kv = BiasedLinear(context_size or hidden_size, 2 * width, bias=bias)
        else:
            self.qkv = BiasedLinear(hidden_size, 3 * width, bias=bias)
        self.is_cross = cross
        self.out = BiasedLinear(width, hidden_size, bias=bias if out_bias is None else out_bias)

    def forward(self, x_BTD: torch.Tensor, context_BSD=None, mask=None, bias=None, *, causal: bool = False) -> torch.Tensor:
        """Attend from x to itself, or with `cross` to the context; returns (B, T, D).

        `mask` is true where a position may be seen, broadcast to (B, H, T, S): `key_mask` makes it of the positions that are no padding.
        `bias` is added to the scores, broadcast likewise. `causal` hides later positions. A query that may see nothing has no defined
        result.
        """
        return self.attend(*self.project(x_BTD, context_BSD), mask, bias, causal=causal)

    def project(self, x_BTD: torch.Tensor, context_BSD=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries (B, H, T, E), keys and values (B, H, S, E)."""
        if self.is_cross:
            return self.queries(x_BTD), *self.keys_values(context_BSD)
        query, key, value = (self._heads(part) for part in self.qkv(x_BTD).chunk(3, -1))
        return query, key, value

    def queries(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the queries of cross-attention, (B, H, T, E)."""
        return self._heads(self.q(x_BTD))

    def keys_values(self, context_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a context, (B, H, S, E) each: the same at every step of generation."""
        key, value = self.kv(context_BSD).chunk(2, -1)
        return self._heads(key), self._heads(value)

    def attend(self, query_BHTE, key_BHSE, value_BHSE, mask=None, bias=None, *, causal: bool = False) -> torch.Tensor:
        """Return what the queries read of the values, projected out, (B, T, D); masks as in `forward`."""
        shown = _shown(mask, bias, causal, query_BHTE, key_BHSE)
        if _products_are_faster(query_BHTE, key_BHSE):
            return self.out(_read_by_products(query_BHTE, key_BHSE, value_BHSE, shown, self.scale).transpose(1, 2).flatten(2))
        whole = causal and mask is None and bias is None and query_BHTE.shape[2] == key_BHSE.shape[2]
        read = F.scaled_dot_product_attention(
            query_BHTE, key_BHSE, value_BHSE, attn_mask=None if whole else shown, is_causal=whole, scale=self.scale
        )
        return self.out(read.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def weights(self, x_BTD: torch.Tensor, context_BSD=None, mask=None, bias=None, *, causal: bool = False) -> torch.Tensor:
        """Return the attention weights, fp32 (B, H, T, S), by plain softmax: the slow twin of what `forward` reads with."""
        query, key, _ = self.project(x_BTD, context_BSD)
        return self.shares(query, key, mask, bias, causal=causal)

    def shares(self, query: torch.Tensor, key: torch.Tensor, mask=None, bias=None, *, causal: bool = False) -> torch.Tensor:
        """Return what `weights` returns, of queries and keys that `project` gave."""
        scores = self.scale * (query.float() @ key.float().transpose(-1, -2))
        shown = _shown(mask, bias, causal, query, key)
        if shown is not None:
            scores = scores.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else scores + shown.float()
        return scores.softmax(-1)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def key_mask(mask_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask of the positions (B, S) that are no padding in the shape that attention takes, (B, 1, 1, S)."""
    return None if mask_BS is None else mask_BS.bool()[:, None, None, :]


def _products_are_faster(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether to train on three plain products: fused attention of a CPU goes backward slowly over short bf16 sequences."""
    short = query.shape[2] <= SHORT and key.shape[2] <= SHORT
    return short and query.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled()


def _read_by_products(query_BHTE, key_BHSE, value_BHSE, shown: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return what the queries read of the values, (B, H, T, E): scores, softmax, sum, each held whole."""
    query, key, value = (x.flatten(0, 1) for x in (query_BHTE, key_BHSE, value_BHSE))
    scores = torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scale).unflatten(0, query_BHTE.shape[:2])
    if shown is not None:
        scores = scores.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else scores + shown
    return torch.bmm(scores.softmax(-1).flatten(0, 1), value).view(query_BHTE.shape)


def _shown(mask, bias, causal: bool, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return mask and causality as one boolean mask, or with a bias as one additive mask in the queries' dtype; None when all is seen.

    The last query stands at the last key, so that queries behind a cache see all of it.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if causal:
        past = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        mask = past if mask is None else mask & past
    if bias is None:
        return mask
    bias = bias.to(query.dtype)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)
