"""Sampling: the drawn distribution is the closed form, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from plinth.config import UserError
from plinth.inference.sampling import (
    SamplingColumns,
    SamplingParams,
    sample_tokens,
    sampling_weights,
    target_distribution,
    top_logprobs,
    uniform_noise,
)

CASES = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "one": {"top_k": 1},
}


def logits_of(seed: int, rows: int, vocab_size: int = 40, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_closed_form(name):
    """Chi-square over 40,000 draws of one row; cells that expect fewer than 5 are pooled."""
    params, draws = SamplingParams(**CASES[name], seed=3), 40_000
    logits_NV = logits_of(0, 1).expand(draws, -1)
    noise = uniform_noise(np.full(draws, 3, dtype=np.uint64), np.arange(draws))
    tokens = sample_tokens(logits_NV, SamplingColumns.of([params] * draws), torch.from_numpy(noise))
    counts = torch.bincount(tokens, minlength=40).numpy()
    expected = np.array(target_distribution(logits_NV[0].tolist(), params)) * draws
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) > 1:
        assert stats.chisquare(counts, expected).pvalue > 1e-3
    else:
        assert counts[0] == draws


@pytest.mark.parametrize("vocab_size", [40, 1500])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_slow_twins(name, vocab_size):
    params = SamplingParams(**CASES[name])
    logits_NV = logits_of(1, 4, vocab_size, scale=0.3 if vocab_size > 40 else 1.5)  # flat: the nucleus exceeds the first sort
    weights = sampling_weights(logits_NV, SamplingColumns.of([params] * 4)).double()
    for row, logits_V in zip(weights / weights.sum(-1, keepdim=True), logits_NV.tolist()):
        np.testing.assert_allclose(row.numpy(), target_distribution(logits_V, params), atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.integers(1, 12), st.floats(0.05, 1.0))
def test_ties_keep_exactly_k_lower_ids_first(levels, top_k, top_p):
    params = SamplingParams(top_k=top_k, top_p=top_p)
    logits_NV = torch.tensor([levels], dtype=torch.float32)
    kept = sampling_weights(logits_NV, SamplingColumns.of([params]))[0] > 0
    order = sorted(range(len(levels)), key=lambda token: (-levels[token], token))
    count = int(kept.sum())
    assert 1 <= count <= top_k
    assert set(kept.nonzero()[:, 0].tolist()) == set(order[:count])


def test_a_row_is_the_same_in_any_company():
    """The mixed batch holds every kind of truncation; each row must be, bit for bit, what it is alone and doubled."""
    params = [SamplingParams(**case, seed=i) for i, case in enumerate(CASES.values())] + [SamplingParams(temperature=0)]
    logits_NV = logits_of(2, len(params), 3000, scale=1.0)
    noise_N = torch.from_numpy(uniform_noise(np.arange(len(params), dtype=np.uint64), np.zeros(len(params), dtype=np.int64)))
    weights = sampling_weights(logits_NV, SamplingColumns.of(params))
    together = sample_tokens(logits_NV, SamplingColumns.of(params), noise_N)
    for i, one in enumerate(params):
        pair = SamplingColumns.of([one, one])
        assert torch.equal(sampling_weights(logits_NV[[i, i]], pair)[0], weights[i]) or one.temperature == 0
        assert sample_tokens(logits_NV[[i, i]], pair, noise_N[[i, i]])[0] == together[i]


def test_greedy_takes_the_lower_id_on_a_tie_and_top_k_1_agrees():
    logits_NV = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=1)):
        assert sample_tokens(logits_NV, SamplingColumns.of([params]), torch.tensor([0.999])).tolist() == [1]


def test_tiny_temperature_is_greedy_without_overflow():
    logits_NV = logits_of(4, 3)
    columns = SamplingColumns.of([SamplingParams(temperature=1e-45)] * 3)
    assert torch.equal(sample_tokens(logits_NV, columns, torch.full((3,), 0.7, dtype=torch.float64)), logits_NV.argmax(-1))


def test_noise_by_hand():
    """Values of SplitMix64 worked out in Python integers."""
    mask = 2**64 - 1

    def mix(word):
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    golden = 0x9E3779B97F4A7C15
    seeds, indices = [0, 1, 2**64 - 1, 12345], [0, 1, 2, 1000]
    expected = [(mix((mix((s + golden) & mask) + (i + 1) * golden) & mask) >> 11) * 2.0**-53 for s, i in zip(seeds, indices)]
    assert uniform_noise(np.array(seeds, dtype=np.uint64), np.array(indices)).tolist() == expected


@pytest.mark.parametrize("axis", ["seed", "index"])
def test_noise_is_uniform_and_uncorrelated(axis):
    count = 200_000
    varied, fixed = np.arange(count, dtype=np.uint64), np.full(count, 5, dtype=np.uint64)
    noise = uniform_noise(varied, fixed) if axis == "seed" else uniform_noise(fixed, varied)
    assert stats.kstest(noise, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / count**0.5


def test_top_logprobs_are_sorted_with_lower_ids_first():
    logprobs_NV = torch.log_softmax(torch.tensor([[1.0, 3.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), -1)
    first, second = top_logprobs(logprobs_NV, 4)
    assert [token for token, _ in first] == [1, 2, 3, 4]
    assert [token for token, _ in second] == [0, 1, 2, 3]
    assert [value for _, value in first] == logprobs_NV[0, [1, 2, 3, 4]].tolist()
    assert top_logprobs(logprobs_NV, 9)[1] == [(i, logprobs_NV[1, i].item()) for i in range(5)]


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "temperature=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "leave it out"),
        ({"min_p": 2}, "min_p=2"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"stop": ("",)}, "empty string"),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_wrong_parameters_are_named(fields, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        SamplingParams(**fields)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all"])
def test_transformers_warpers_keep_the_same_tokens(name):
    transformers = pytest.importorskip("transformers")
    case = {"temperature": 1.0} | CASES[name]
    logits_NV = logits_of(5, 6, 200)
    warpers = [transformers.TemperatureLogitsWarper(case["temperature"])]
    warpers += [transformers.TopKLogitsWarper(case["top_k"])] if "top_k" in case else []
    warpers += [transformers.TopPLogitsWarper(case["top_p"])] if "top_p" in case else []
    warpers += [transformers.MinPLogitsWarper(case["min_p"])] if "min_p" in case else []
    scores = logits_NV
    for warper in warpers:
        scores = warper(None, scores)
    weights = sampling_weights(logits_NV, SamplingColumns.of([SamplingParams(**case)] * 6))
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), scores.softmax(-1), atol=1e-6, rtol=1e-5)
