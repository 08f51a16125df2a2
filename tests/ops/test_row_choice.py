"""The kernels that choose a token are their twins: the same token for the same noise, whatever the row looks like."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.inference.sampling import NO_LIMIT, SamplingParams, target_distribution
from plinth.ops import kernels, row_choice

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels: {kernels.why_not()}")
SHAPES = {"flat": 0.01, "normal": 1.0, "peaked": 4.0}


def rows_of(vocab_size: int, scale: float, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale


def options(params: SamplingParams, noise: float) -> np.ndarray:
    p = params
    return np.array([[p.temperature, p.top_k or NO_LIMIT, p.top_p or 1.0, p.min_p or 0.0, p.typical_p or 1.0, noise]])


def support(logits_V: torch.Tensor, params: SamplingParams, draws: int) -> set[int]:
    """Return the tokens that evenly spaced noise draws."""
    each = np.concatenate([options(params, (i + 0.5) / draws) for i in range(draws)])
    return set(row_choice.draw(logits_V[None], [0] * draws, each).tolist())


def check_draws(logits_V: torch.Tensor, params: SamplingParams) -> None:
    """Each noise must give the token whose interval of the exact cumulative distribution holds it, but for rounding at the edges."""
    cumulative = np.cumsum(target_distribution(logits_V.tolist(), params))
    noise = (np.arange(97) + 0.5) / 97
    tokens = row_choice.draw(logits_V[None], [0] * 97, np.concatenate([options(params, value) for value in noise]))
    for value, token in zip(noise, tokens.tolist()):
        low, high = (cumulative[token - 1] if token else 0.0), cumulative[token]
        assert low - 3e-5 <= value <= high + 3e-5 and high > low - 1e-12


@pytest.mark.parametrize("scale", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 1023, 1025, 5003])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 7},
        {"top_k": 700, "temperature": 3.0},
        {"top_p": 0.9},
        {"top_p": 0.1, "temperature": 2.0},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"typical_p": 0.4},
        {"top_k": 300, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.7},
    ],
    ids=str,
)
def test_draws_are_of_the_exact_distribution(case, vocab_size, scale):
    check_draws(rows_of(vocab_size, scale)[0], SamplingParams(**case))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 1.0, 3.0]), min_size=1, max_size=40).filter(lambda levels: max(levels) > -np.inf),
    st.integers(1, 45),
    st.sampled_from([0.05, 0.3, 0.75, 1.0]),
    st.sampled_from([0.3, 1.0]),
)
def test_ties_and_impossible_tokens(levels, top_k, top_p, typical_p):
    """Among equals the lower ids stay; what is -inf is never drawn."""
    params = SamplingParams(top_k=top_k, top_p=top_p, typical_p=typical_p)
    exact = target_distribution(levels, params)
    drawn = support(torch.tensor(levels), params, 400)
    assert drawn <= {token for token, p in enumerate(exact) if p > 0}
    assert drawn >= {token for token, p in enumerate(exact) if p > 0.01}


@pytest.mark.parametrize("vocab_size", [1, 16, 50, 1023, 5003])
@pytest.mark.parametrize("count", [1, 5, 100])
def test_largest_are_sorted_with_lower_ids_first(vocab_size, count):
    logits_NV = rows_of(vocab_size, 1.0).mul(4).round()  # many ties
    count = min(count, vocab_size)
    found = row_choice.largest(logits_NV, count).tolist()
    for row, ids in zip(logits_NV.tolist(), found):
        assert ids == sorted(range(vocab_size), key=lambda token: (-row[token], token))[:count]


@pytest.mark.parametrize("vocab_size", [1, 17, 1024, 5003])
def test_peaks(vocab_size):
    logits_NV = torch.cat([rows_of(vocab_size, scale) for scale in (0.01, 3.0, 40.0)])
    logits_NV[0, vocab_size // 2 :] = -torch.inf
    logits_NV[1] = 7.0
    best_N, log_sums_N = row_choice.peaks(logits_NV)
    torch.testing.assert_close(log_sums_N.double(), logits_NV.double().logsumexp(-1), atol=1e-6, rtol=2e-7)
    if vocab_size > 1:
        assert best_N.tolist() == [row.index(max(row)) for row in logits_NV.tolist()]


def test_a_row_is_the_same_alone():
    logits_NV = rows_of(5003, 1.0, rows=9)
    each = np.concatenate([options(SamplingParams(top_p=0.9, typical_p=0.8), i / 9) for i in range(9)])
    best_N, log_sums_N = row_choice.peaks(logits_NV)
    drawn = row_choice.draw(logits_NV, range(9), each)
    for i in range(9):
        alone = logits_NV[i : i + 1].clone()
        assert row_choice.peaks(alone)[1].item() == log_sums_N[i].item()
        assert row_choice.draw(alone, [0], each[i : i + 1]).item() == drawn[i].item()
