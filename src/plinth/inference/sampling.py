"""Choosing the next token: from a row of logits, the parameters of a request and noise that belongs to it alone.

Order: logit_bias; repetition penalty; presence and frequency penalty; then what is forbidden (ends before min_tokens,
everything but allowed_token_ids, what the grammar's mask rules out); temperature; top-k; top-p; min-p; typical. Each works
on what the one before left. Log-probabilities that are reported are those of the raw logits, before all of this.

A draw inverts the cumulative distribution, in order of token ids, at one uniform number, a pure function of (seed of the
request, index of the token in its completion). So a token never depends on which other requests share the batch, nor on
the batch's size. Every step works on each row alone, with the same order of additions whatever the number of rows.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plinth.inference import penalties
from plinth.inference.penalties import TokenCounts
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.truncation import NO_LIMIT, SamplingColumns, largest_mask, sampling_weights
from plinth.ops import row_choice
from plinth.ops.mask import add_mask


@dataclass(frozen=True)
class Chosen:
    """One token for each of N rows."""

    tokens: list[int]
    """token ids; -1 in a row in which nothing is allowed"""
    logprobs: list[float]
    """log-probability in nats of each token under the raw logits; NaN in a row that holds one, -inf for token -1"""
    top_logprobs: list[list[tuple[int, float]]]
    """(token id, log-probability in nats) of as many alternatives as each row asked for, most probable first"""


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


@torch.inference_mode()
def choose_tokens(
    logits_NV: torch.Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int] | np.ndarray,
    indices: Sequence[int] | np.ndarray,
    histories: Sequence[TokenCounts | None] | None = None,
    masks: Sequence[np.ndarray | None] | None = None,
    *,
    eos_ids: Collection[int] = (),
) -> Chosen:
    """Choose a token for each row of float32 logits, which are as before when it returns.

    seeds: 0 to 2**64 - 1 each. indices: how many tokens each completion has. histories: wanted where params.needs_history.
    masks: a row's allowed tokens, uint8 (ceil(V / 8),), bit i % 8 of byte i // 8 for token i; None = all.
    eos_ids: the model's own ends, for min_tokens.
    """
    tokens_N, log_sums_N = peaks(logits_NV)
    allowed = _allowed(params, masks, logits_NV.shape[1])
    rows = [i for i, p in enumerate(params) if p.temperature > 0 or p.changes_logits or allowed[i] is not None]
    if rows:
        entries = _changed_entries(params, indices, histories, eos_ids, logits_NV.device)
        before_E = logits_NV[entries]
        change_logits(logits_NV, params, indices, histories, eos_ids=eos_ids)
        noise_M = uniform_noise(np.asarray(seeds, dtype=np.uint64)[rows], np.asarray(indices)[rows])
        tokens_N[rows] = _draw(logits_NV, rows, [params[i] for i in rows], noise_M, [allowed[i] for i in rows])
        logits_NV[entries] = before_E
    logprobs_N = logits_NV.gather(-1, tokens_N.clamp_min(0)[:, None])[:, 0] - log_sums_N
    if rows:
        logprobs_N = torch.where((tokens_N < 0) & ~log_sums_N.isnan(), -torch.inf, logprobs_N)
    return Chosen(tokens_N.tolist(), logprobs_N.tolist(), _alternatives(logits_NV, log_sums_N, [p.logprobs or 0 for p in params]))


def copy_rows(logits_NV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return a copy of some rows.

    On the CPU numpy makes it, on this thread: PyTorch would wake its own threads for it, which then wait for more work on the core
    that the model's next call needs, for longer than that call takes.
    """
    if logits_NV.device.type != "cpu":
        return logits_NV[list(rows)]
    return torch.from_numpy(logits_NV.numpy()[list(rows)])


def peaks(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable token a row, int64 (N,), the lower id on a tie, and the log of the sum of exponentials, float32 (N,)."""
    if row_choice.usable(logits_NV):
        return row_choice.peaks(logits_NV)
    return logits_NV.argmax(-1), logits_NV.logsumexp(-1)


def _allowed(params: Sequence[SamplingParams], masks: Sequence[np.ndarray | None] | None, vocab_size: int) -> list[np.ndarray | None]:
    """Return for each row the mask of what both its grammar and its allowed_token_ids let through; None = all."""
    found: list[np.ndarray | None] = [None] * len(params) if masks is None else list(masks)
    for i, p in enumerate(params):
        if p.allowed_token_ids is not None:
            ids = penalties.mask_of_ids(p.allowed_token_ids, vocab_size)
            found[i] = ids if (mask := found[i]) is None else ids & mask
    return found


def change_logits(
    logits_NV: torch.Tensor,
    params: Sequence[SamplingParams],
    indices: Sequence[int] | np.ndarray,
    histories: Sequence[TokenCounts | None] | None = None,
    *,
    eos_ids: Collection[int] = (),
) -> None:
    """Apply, in place, what comes before masks and temperature; arguments as of choose_tokens."""
    device = logits_NV.device
    biased = [(i, token, bias) for i, p in enumerate(params) for token, bias in p.logit_bias]
    if biased:
        rows, ids, bias = zip(*biased)
        penalties.add_bias(logits_NV, _ids(rows, device), _ids(ids, device), torch.tensor(bias, device=device))
    _penalise(logits_NV, params, histories)
    early = _early_ends(params, indices, eos_ids)
    if early:
        rows, ids = zip(*early)
        penalties.forbid(logits_NV, _ids(rows, device), _ids(ids, device))


def _early_ends(params: Sequence[SamplingParams], indices: Sequence[int] | np.ndarray, eos_ids: Collection[int]) -> list[tuple[int, int]]:
    return [(i, token) for i, p in enumerate(params) if indices[i] < p.min_tokens for token in p.end_ids(eos_ids)]


def _changed_entries(params, indices, histories, eos_ids: Collection[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and token ids of all logits that change_logits changes, some of them twice."""
    pairs = _early_ends(params, indices, eos_ids) + [(i, token) for i, p in enumerate(params) for token, _ in p.logit_bias]
    rows, ids = [np.array([row for row, _ in pairs], np.int64)], [np.array([token for _, token in pairs], np.int64)]
    for i, p in enumerate(params):
        if p.needs_history:
            assert histories is not None and histories[i] is not None, "penalties need the tokens so far"
            ids.append(histories[i].ids)
            rows.append(np.full(len(ids[-1]), i))
    return torch.from_numpy(np.concatenate(rows)).to(device), torch.from_numpy(np.concatenate(ids)).to(device)


def _penalise(logits_NV: torch.Tensor, params: Sequence[SamplingParams], histories: Sequence[TokenCounts | None] | None) -> None:
    rows = [i for i, p in enumerate(params) if p.needs_history]
    if not rows:
        return
    assert histories is not None
    seen: list[TokenCounts] = [histories[i] for i in rows]  # type: ignore[misc]
    device, lengths = logits_NV.device, [len(history.ids) for history in seen]

    def spread(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(device)

    rows_E = torch.from_numpy(np.repeat(np.array(rows), lengths)).to(device)
    ids_E = torch.from_numpy(np.concatenate([history.ids for history in seen])).to(device)
    counts_E = torch.from_numpy(np.concatenate([history.counts for history in seen])).to(device)
    penalties.penalise_repetition(logits_NV, rows_E, ids_E, spread([params[i].repetition_penalty or 1.0 for i in rows]))
    presence, frequency = ([getattr(params[i], name) or 0.0 for i in rows] for name in ("presence_penalty", "frequency_penalty"))
    penalties.penalise_counts(logits_NV, rows_E, ids_E, counts_E, spread(presence), spread(frequency))


def _ids(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _draw(
    logits_NV: torch.Tensor,
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    noise_M: np.ndarray,
    masks: Sequence[np.ndarray | None],
) -> torch.Tensor:
    """Return a token for each of `rows`, int64 (M,), -1 where every logit is -inf."""
    if row_choice.usable(logits_NV):
        options_MO = np.array([_options(p, noise) for p, noise in zip(params, noise_M)])
        return row_choice.draw(logits_NV, rows, options_MO, masks)
    logits_MV = copy_rows(logits_NV, rows)
    for i, mask in enumerate(masks):
        if mask is not None:
            add_mask(logits_MV[i : i + 1], mask[None])
    noise = torch.from_numpy(noise_M).to(logits_NV.device)
    tokens_M = sample_tokens(logits_MV, SamplingColumns.of(params, logits_NV.device), noise)
    return torch.where(logits_MV.amax(-1) == -torch.inf, -1, tokens_M)


def _options(params: SamplingParams, noise: float) -> tuple[float, ...]:
    """Return the columns of row_choice.OPTIONS; None becomes what keeps all tokens."""
    p = params
    return (p.temperature, p.top_k or NO_LIMIT, p.top_p or 1.0, p.min_p or 0.0, p.typical_p or 1.0, noise)


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


def _alternatives(logits_NV: torch.Tensor, log_sums_N: torch.Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Return the most probable tokens, as many as each row asks for; rows that want the same number are found together."""
    found: list[list[tuple[int, float]]] = [[] for _ in counts]
    for count in set(counts) - {0}:
        rows = [i for i, wanted in enumerate(counts) if wanted == count]
        every = len(rows) == len(logits_NV)
        logits_MV, log_sums_M = (logits_NV, log_sums_N) if every else (copy_rows(logits_NV, rows), log_sums_N[rows])
        for i, top in zip(rows, largest_logprobs(logits_MV, log_sums_M, count)):
            found[i] = top
    return found


def largest_logprobs(logits_NV: torch.Tensor, log_sums_N: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return the `count` most probable (token id, log-probability in nats) a row, the lower id first among equals."""
    count = min(count, logits_NV.shape[-1])
    if count == 0:
        return [[] for _ in logits_NV]
    ids_NC = row_choice.largest(logits_NV, count) if row_choice.usable(logits_NV) else _largest(logits_NV, count)
    values_NC = logits_NV.gather(-1, ids_NC.clamp_min(0)) - log_sums_N[:, None]
    return [[pair for pair in zip(ids, values) if pair[0] >= 0] for ids, values in zip(ids_NC.tolist(), values_NC.tolist())]


def _largest(logits_NV: torch.Tensor, count: int) -> torch.Tensor:
    threshold_N = logits_NV.topk(count, dim=-1).values[:, -1]
    kept_NV = largest_mask(logits_NV, threshold_N, torch.full_like(threshold_N, count, dtype=torch.int64))
    ids_NC = kept_NV.nonzero()[:, 1].view(-1, count)
    order_NC = logits_NV.gather(-1, ids_NC).sort(dim=-1, descending=True, stable=True).indices
    return ids_NC.gather(-1, order_NC)


def target_distribution(
    logits_V: Sequence[float], params: SamplingParams, history: TokenCounts | None = None, index: int | None = None
) -> list[float]:
    """Return the exact distribution that `params` draws from, in plain Python: the slow twin of choose_tokens without masks.

    Probabilities over the vocabulary, they sum to 1; greedy puts all on one token. history and index, the number of tokens
    that the completion has, as in choose_tokens; without an index, min_tokens is not looked at.
    """
    logits_V = _changed(logits_V, params, history, index)
    ranked = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
    if params.temperature == 0:
        return [float(token == ranked[0]) for token in range(len(logits_V))]
    peak = logits_V[ranked[0]]
    weights = {token: math.exp((logits_V[token] - peak) / params.temperature) for token in ranked}
    kept = ranked[: params.top_k]
    if params.top_p is not None and params.top_p < 1:
        kept = _fewest(kept, weights, params.top_p)
    kept = [token for token in kept if weights[token] >= (params.min_p or 0.0) * weights[ranked[0]]]
    if params.typical_p is not None and params.typical_p < 1:
        total = sum(weights[token] for token in kept)
        surprise = {token: -math.log(weights[token] / total) for token in kept if weights[token] > 0}
        expected = sum(surprise[token] * weights[token] / total for token in surprise)
        kept = _fewest(sorted(surprise, key=lambda token: (abs(surprise[token] - expected), token)), weights, params.typical_p)
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in set(kept) else 0.0 for token in range(len(logits_V))]


def _fewest(ordered: list[int], weights: dict[int, float], share: float) -> list[int]:
    """Return the first of the tokens, as many as it takes to reach the share of their mass."""
    total, reached = sum(weights[token] for token in ordered), 0.0
    for count, token in enumerate(ordered, start=1):
        reached += weights[token]
        if reached >= share * total:
            return ordered[:count]
    return ordered


def _changed(logits_V: Sequence[float], params: SamplingParams, history: TokenCounts | None, index: int | None) -> list[float]:
    changed = [logit + dict(params.logit_bias).get(token, 0.0) for token, logit in enumerate(logits_V)]
    for token, count in zip(history.ids.tolist(), history.counts.tolist()) if history is not None else ():
        factor = params.repetition_penalty or 1.0
        changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        changed[token] -= (params.frequency_penalty or 0.0) * count + (params.presence_penalty or 0.0) * (count > 0)
    banned = set(params.stop_token_ids) if index is not None and index < params.min_tokens else set()
    if params.allowed_token_ids is not None:
        banned |= set(range(len(changed))) - set(params.allowed_token_ids)
    return [-math.inf if token in banned else logit for token, logit in enumerate(changed)]
