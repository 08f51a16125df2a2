"""Choosing the next token: sampling parameters, truncation, and noise that belongs to a request alone.

Order: temperature, then top-k, then top-p on what top-k left (renormalised), then min-p.  Log-probabilities that are
reported are always those of the raw model distribution, before temperature and truncation.

A draw inverts the cumulative distribution at one uniform number, a pure function of (seed of the request, index of the
token in its completion).  So a token never depends on which other requests share the batch, nor on the batch's size.
Every step here works on each row alone, with the same order of additions whatever the number of rows.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from plinth.config import UserError

NUCLEUS_COLUMNS = 64  # sorted columns tried first for top-p; while some nucleus is wider, NUCLEUS_GROWTH times as many
NUCLEUS_GROWTH = 8
SMALLEST_TEMPERATURE = 1e-30  # below it a division would overflow; such a row is as good as greedy


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens for one request, and when to stop."""

    temperature: float = 1.0
    """divisor of the logits; 0 = always the most probable token (the lower id on a tie)"""
    top_k: int | None = None
    """keep only this many most probable tokens; None = all"""
    top_p: float | None = None
    """keep the fewest tokens whose probability together reaches this share, in (0, 1]; None = all"""
    min_p: float | None = None
    """keep tokens at least this many times as probable as the most probable one, in [0, 1]; None = all"""
    max_tokens: int = 128
    """completion tokens at most; the context of the model bounds it too"""
    stop: tuple[str, ...] = ()
    """strings that end the text; they are not part of it"""
    stop_token_ids: tuple[int, ...] = ()
    """token ids that end the completion, beside the model's own end; they are not part of it"""
    seed: int | None = None
    """seed of this request alone; None = a fresh one from the operating system"""
    logprobs: int | None = None
    """alternatives to report a token, most probable first, raw model distribution; None or 0 = only the chosen token's"""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or more")
        _check_number("top_p", self.top_p, 0.0, 1.0, "more than 0 and at most 1; leave it out to keep all tokens")
        _check_number("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        if self.top_p == 0:
            raise UserError("top_p=0 keeps no token. It must be more than 0 and at most 1; for greedy choice use temperature=0.")
        _check_count("top_k", self.top_k, 1, "leave it out to keep all tokens")
        _check_count("max_tokens", self.max_tokens, 1, "it bounds the completion's length")
        _check_count("logprobs", self.logprobs, 0, "it is the number of alternatives a token")
        if self.seed is not None and not isinstance(self.seed, int):
            raise UserError(f"seed={self.seed!r} is not a whole number.")
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in self.stop_token_ids))


def _check_number(name: str, value: float | None, low: float, high: float, rule: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (low <= value <= high) or math.isinf(value):
        raise UserError(f"{name}={value!r} is out of range: it must be {rule}.")


def _check_count(name: str, value: int | None, low: int, rule: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise UserError(f"{name}={value!r} is not a whole number of at least {low}: {rule}.")


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stop):
        raise UserError(f"stop={list(stop)!r} holds an empty string or no string: it would end every text at once. Remove it.")
    return stop


def fresh_seed() -> int:
    """Return a seed from the operating system's randomness, below 2**63."""
    return secrets.randbits(63)


def uniform_noise(seeds: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return one number in [0, 1) a row, a multiple of 2**-53, from uint64 seeds and token indices, both (N,).

    The output of index i is the (i + 1)-th of a SplitMix64 generator whose start is a mix of the seed.
    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = _mix64(seeds.astype(np.uint64) + golden) + (indices.astype(np.uint64) + np.uint64(1)) * golden
        return (_mix64(states) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class SamplingColumns:
    """The parameters of N rows as tensors, (N,) each, so that one call samples for all of them."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    any_greedy: bool
    any_sampled: bool
    any_truncated: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingColumns:
        """Gather the parameters of each row; absent truncations become ones that keep all tokens."""
        no_limit = 2**31 - 1
        return cls(
            torch.tensor([float(p.temperature) for p in params], dtype=torch.float32, device=device),
            torch.tensor([p.top_k or no_limit for p in params], dtype=torch.int64, device=device),
            torch.tensor([1.0 if p.top_p is None else p.top_p for p in params], dtype=torch.float64, device=device),
            torch.tensor([p.min_p or 0.0 for p in params], dtype=torch.float32, device=device),
            any(p.temperature == 0 for p in params),
            any(p.temperature > 0 for p in params),
            any(p.temperature > 0 and (p.top_k or p.min_p or (p.top_p or 1.0) < 1.0) for p in params),
        )

    def rows(self, index_M: torch.Tensor) -> SamplingColumns:
        """Return the columns of some rows only."""
        picked = [value[index_M] if isinstance(value := getattr(self, f.name), torch.Tensor) else value for f in fields(self)]
        return SamplingColumns(*picked)  # type: ignore[arg-type]


def sample_tokens(logits_NV: torch.Tensor, columns: SamplingColumns, noise_N: torch.Tensor) -> torch.Tensor:
    """Return one token id a row, int64 (N,).

    logits_NV is float32; noise_N is float64 in [0, 1), unused by greedy rows.
    """
    if not columns.any_sampled:
        return logits_NV.argmax(-1)
    cumulative_NV = sampling_weights(logits_NV, columns).cumsum(-1, dtype=torch.float64)
    targets_N1 = (noise_N * cumulative_NV[:, -1])[:, None]
    drawn_N = torch.searchsorted(cumulative_NV, targets_N1, right=True)[:, 0]
    drawn_N = drawn_N.clamp_max(logits_NV.shape[-1] - 1)  # past the end only in a row of NaN
    return torch.where(columns.temperature > 0, drawn_N, logits_NV.argmax(-1)) if columns.any_greedy else drawn_N


def sampling_weights(logits_NV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """Return the unnormalised distribution that sampling draws from, float32 (N, V); greedy rows hold temperature 1."""
    temperature_N = torch.where(columns.temperature > 0, columns.temperature, 1.0).clamp_min(SMALLEST_TEMPERATURE)
    shifted_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    weights_NV = torch.softmax(shifted_NV / temperature_N[:, None], -1)
    if not columns.any_truncated:
        return weights_NV
    vocab_size = logits_NV.shape[-1]
    truncated_N = (columns.temperature > 0) & ((columns.top_k < vocab_size) | (columns.top_p < 1) | (columns.min_p > 0))
    index_M = truncated_N.nonzero()[:, 0]
    if len(index_M) == len(truncated_N):
        return truncate(logits_NV, weights_NV, columns)
    if len(index_M):
        weights_NV[index_M] = truncate(logits_NV[index_M], weights_NV[index_M], columns.rows(index_M))
    return weights_NV


def truncate(logits_NV: torch.Tensor, weights_NV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """Return the weights with zeros where top-k, top-p or min-p drop a token; at least one stays a row."""
    by_rank = bool((columns.top_k < logits_NV.shape[-1]).any() or (columns.top_p < 1).any())
    if by_rank:
        count_N, threshold_N = nucleus_counts(logits_NV, weights_NV, columns)
        kept_NV = largest_mask(logits_NV, threshold_N, count_N)
        weights_NV = weights_NV * kept_NV
    floor_N1 = columns.min_p[:, None] * weights_NV.amax(-1, keepdim=True)
    return weights_NV * (weights_NV >= floor_N1)


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


def top_logprobs(logprobs_NV: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return the `count` most probable (token id, log-probability in nats) a row, the lower id first among equals."""
    count = min(count, logprobs_NV.shape[-1])
    if count == 0:
        return [[] for _ in logprobs_NV]
    threshold_N = logprobs_NV.topk(count, dim=-1).values[:, -1]
    kept_NV = largest_mask(logprobs_NV, threshold_N, torch.full_like(threshold_N, count, dtype=torch.int64))
    ids_NC = kept_NV.nonzero()[:, 1].view(-1, count)
    values_NC, order_NC = logprobs_NV.gather(-1, ids_NC).sort(dim=-1, descending=True, stable=True)
    ids_NC = ids_NC.gather(-1, order_NC)
    return [list(zip(ids, values)) for ids, values in zip(ids_NC.tolist(), values_NC.tolist())]


def target_distribution(logits_V: Sequence[float], params: SamplingParams) -> list[float]:
    """Return the exact distribution that `params` draws from, in plain Python: the slow twin of sample_tokens.

    Probabilities over the vocabulary, they sum to 1; greedy puts all on one token.
    """
    ranked = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
    if params.temperature == 0:
        return [float(token == ranked[0]) for token in range(len(logits_V))]
    peak = logits_V[ranked[0]]
    weights = {token: math.exp((logits_V[token] - peak) / params.temperature) for token in ranked}
    kept = ranked[: params.top_k]
    if params.top_p is not None and params.top_p < 1:
        total, reached, nucleus = sum(weights[token] for token in kept), 0.0, []
        for token in kept:
            nucleus.append(token)
            reached += weights[token]
            if reached >= params.top_p * total:
                break
        kept = nucleus
    kept = [token for token in kept if weights[token] >= (params.min_p or 0.0) * weights[ranked[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in set(kept) else 0.0 for token in range(len(logits_V))]
