"""Which tokens stay in the draw, in PyTorch: the twin, for any device, of the kernel behind plinth.ops.row_choice.

Order: temperature, top-k, top-p, min-p, typical. Each works on what the one before left, renormalised. Every step works on
each row alone, with the same order of additions whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from plinth.inference.sampling_params import SamplingParams

NUCLEUS_COLUMNS = 64  # sorted columns tried first for top-p; while some nucleus is wider, NUCLEUS_GROWTH times as many
NUCLEUS_GROWTH = 8
SMALLEST_TEMPERATURE = 1e-30  # below it a division would overflow; such a row is as good as greedy
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class SamplingColumns:
    """The parameters of N rows as tensors, (N,) each, so that one call samples for all of them."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor
    any_greedy: bool
    any_sampled: bool
    any_truncated: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingColumns:
        """Gather the parameters of each row; absent truncations become ones that keep all tokens."""
        return cls(
            torch.tensor([float(p.temperature) for p in params], dtype=torch.float32, device=device),
            torch.tensor([p.top_k or NO_LIMIT for p in params], dtype=torch.int64, device=device),
            torch.tensor([1.0 if p.top_p is None else p.top_p for p in params], dtype=torch.float64, device=device),
            torch.tensor([p.min_p or 0.0 for p in params], dtype=torch.float32, device=device),
            torch.tensor([1.0 if p.typical_p is None else p.typical_p for p in params], dtype=torch.float64, device=device),
            any(p.temperature == 0 for p in params),
            any(p.temperature > 0 for p in params),
            any(p.temperature > 0 and p.ranks_tokens for p in params),
        )

    def rows(self, index_M: torch.Tensor) -> SamplingColumns:
        """Return the columns of some rows only."""
        picked = [value[index_M] if isinstance(value := getattr(self, f.name), torch.Tensor) else value for f in fields(self)]
        return SamplingColumns(*picked)  # type: ignore[arg-type]


def sampling_weights(logits_NV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """Return the unnormalised distribution that sampling draws from, float32 (N, V); greedy rows hold temperature 1."""
    temperature_N = torch.where(columns.temperature > 0, columns.temperature, 1.0).clamp_min(SMALLEST_TEMPERATURE)
    shifted_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    weights_NV = torch.softmax(shifted_NV / temperature_N[:, None], -1)
    if not columns.any_truncated:
        return weights_NV
    vocab_size = logits_NV.shape[-1]
    ranked_N = (columns.top_k < vocab_size) | (columns.top_p < 1) | (columns.min_p > 0) | (columns.typical_p < 1)
    truncated_N = (columns.temperature > 0) & ranked_N
    index_M = truncated_N.nonzero()[:, 0]
    if len(index_M) == len(truncated_N):
        return truncate(logits_NV, weights_NV, columns)
    if len(index_M):
        weights_NV[index_M] = truncate(logits_NV[index_M], weights_NV[index_M], columns.rows(index_M))
    return weights_NV


def truncate(logits_NV: torch.Tensor, weights_NV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """Return the weights with zeros where top-k, top-p, min-p or typical drop a token; at least one stays a row."""
    by_rank = bool((columns.top_k < logits_NV.shape[-1]).any() or (columns.top_p < 1).any())
    if by_rank:
        count_N, threshold_N = nucleus_counts(logits_NV, weights_NV, columns)
        kept_NV = largest_mask(logits_NV, threshold_N, count_N)
        weights_NV = weights_NV * kept_NV
    floor_N1 = columns.min_p[:, None] * weights_NV.amax(-1, keepdim=True)
    weights_NV = weights_NV * (weights_NV >= floor_N1)
    return keep_typical(weights_NV, columns.typical_p) if bool((columns.typical_p < 1).any()) else weights_NV


def keep_typical(weights_NV: torch.Tensor, share_N: torch.Tensor) -> torch.Tensor:
    """Return the weights of the tokens whose surprise is nearest to the expected surprise, the fewest that reach the share; rest 0.

    Source: Meister et al. 2023, "Locally typical sampling", arXiv:2202.00666, section 4.
    """
    total_N1 = weights_NV.sum(-1, dtype=torch.float64, keepdim=True)
    surprise_NV = -(weights_NV.double() / total_N1).log()
    entropy_N1 = torch.where(weights_NV > 0, surprise_NV * weights_NV / total_N1, 0.0).sum(-1, keepdim=True)
    distance_NV, order_NV = (surprise_NV - entropy_N1).abs().sort(dim=-1, stable=True)
    before_NV = weights_NV.gather(-1, order_NV).cumsum(-1, dtype=torch.float64).roll(1, -1)
    before_NV[:, 0] = 0.0
    kept_NV = (before_NV < share_N[:, None] * total_N1) | (share_N[:, None] >= 1)
    return weights_NV * torch.zeros_like(kept_NV).scatter_(-1, order_NV, kept_NV)


def nucleus_counts(logits_NV: torch.Tensor, weights_NV: torch.Tensor, columns: SamplingColumns) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many of its most probable tokens a row keeps by top-k and top-p, and the last kept logit.

    Sums run in float64 from the most probable token on, so the answer is the same however many columns were sorted.
    """
    vocab_size = logits_NV.shape[-1]
    top_k_N = columns.top_k.clamp_max(vocab_size)
    limited_N = top_k_N < vocab_size
    nucleus_N = columns.top_p < 1
    width = int(torch.where(limited_N, top_k_N, 1).max())
    if bool((nucleus_N & ~limited_N).any()):
        width = max(width, NUCLEUS_COLUMNS)
    while True:
        width = min(width, vocab_size)
        sorted_NC, order_NC = logits_NV.topk(width, dim=-1)
        cumulative_NC = weights_NV.gather(-1, order_NC).cumsum(-1, dtype=torch.float64)
        at_k_N = cumulative_NC.gather(-1, (top_k_N.clamp_max(width) - 1)[:, None])[:, 0]
        total_N = torch.where(limited_N, at_k_N, weights_NV.sum(-1, dtype=torch.float64))
        reached_N = (cumulative_NC < (columns.top_p * total_N)[:, None]).sum(-1) + 1
        if width == vocab_size or not bool((nucleus_N & ~limited_N & (reached_N > width)).any()):
            break
        width *= NUCLEUS_GROWTH
    count_N = torch.where(nucleus_N, torch.minimum(reached_N, top_k_N), top_k_N).clamp_max(vocab_size)
    last_N = sorted_NC.gather(-1, (count_N.clamp_max(width) - 1)[:, None])[:, 0]
    everything_N = count_N >= vocab_size  # rows cut by min-p only; their last logit may lie outside the sorted columns
    return count_N, torch.where(everything_N, -torch.inf, last_N)


def largest_mask(values_NV: torch.Tensor, threshold_N: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """Mark exactly count_N values a row, the largest; among equals to the threshold the lower ids win. bool (N, V)."""
    above_NV = values_NV > threshold_N[:, None]
    equal_NV = values_NV == threshold_N[:, None]
    room_N1 = (count_N - above_NV.sum(-1))[:, None]
    if bool((equal_NV.sum(-1, keepdim=True) <= room_N1).all()):  # no tie to break
        return above_NV | equal_NV
    return above_NV | (equal_NV & (equal_NV.cumsum(-1, dtype=torch.int32) <= room_N1))
