"""Sampling: the drawn distribution is the closed form, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from plinth.inference.penalties import TokenCounts
from plinth.inference.sampling import SamplingParams, choose_tokens, largest_logprobs, sample_tokens, target_distribution, uniform_noise
from plinth.inference.truncation import SamplingColumns, sampling_weights

CASES = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "one": {"top_k": 1},
    "typical": {"typical_p": 0.6},
    "typical of the rest": {"temperature": 1.2, "top_k": 20, "typical_p": 0.5},
    "nucleus of the likely": {"min_p": 0.02, "top_p": 0.7},
    "biased": {"logit_bias": ((3, 2.5), (7, -4.0)), "temperature": 0.8},
    "allowed": {"allowed_token_ids": (1, 5, 9, 33), "top_p": 0.95},
    "penalised": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "everything": {
        "temperature": 1.1,
        "top_k": 15,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.9,
        "logit_bias": ((0, 3.0),),
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "min_tokens": 2**20,
        "max_tokens": 2**20,
        "stop_token_ids": (0, 2),
    },
}
TRUNCATIONS = [name for name, case in CASES.items() if not SamplingParams(**case).changes_logits]


def history() -> TokenCounts:
    counts = TokenCounts([1, 4, 4, 9])
    for token in (4, 6, 6, 6):
        counts.add(token)
    return counts


def logits_of(seed: int, rows: int, vocab_size: int = 40, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def expected_distribution(logits_V: torch.Tensor, params: SamplingParams) -> list[float]:
    return target_distribution(logits_V.tolist(), params, history(), index=0)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_closed_form(name):
    """Chi-square over 40,000 draws of one row; cells that expect fewer than 5 are pooled."""
    params, draws, block = SamplingParams(**CASES[name], seed=3), 40_000, 4_000
    logits_NV, tokens = logits_of(0, 1).repeat(block, 1), []
    for start in range(0, draws, block):
        chosen = choose_tokens(logits_NV, [params] * block, [3] * block, range(start, start + block), [history()] * block)
        tokens += chosen.tokens
    counts = np.bincount(tokens, minlength=40)
    expected = np.array(expected_distribution(logits_NV[0], params)) * draws
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) > 1:
        assert stats.chisquare(counts, expected).pvalue > 1e-3
    else:
        assert counts[0] == draws


@pytest.mark.parametrize("vocab_size", [40, 1500])
@pytest.mark.parametrize("name", TRUNCATIONS)
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


@pytest.mark.parametrize("vocab_size", [40, 3000])
def test_a_row_is_the_same_in_any_company(vocab_size):
    """The mixed batch holds every kind of parameter; each row must be, bit for bit, what it is alone and doubled."""
    cases = [*CASES.values(), {"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.5}, {"temperature": 0, "logprobs": 3}]
    params = [SamplingParams(**({"logprobs": i % 3} | case), seed=i) for i, case in enumerate(cases)]
    count = len(params)
    logits_NV = logits_of(2, count, vocab_size, scale=1.0)
    mask = np.random.default_rng(0).integers(0, 256, (vocab_size + 7) // 8, dtype=np.uint8)
    mask[0] |= 2  # one of the ids that "allowed" leaves
    masks = [mask if i % 2 else None for i in range(count)]
    before = logits_NV.clone()
    together = choose_tokens(logits_NV, params, range(count), range(count), [history()] * count, masks, eos_ids=(5,))
    assert torch.equal(logits_NV, before)
    for i, one in enumerate(params):
        for rows in ([i], [i, i]):
            alone = choose_tokens(
                logits_NV[rows], [one] * len(rows), rows, rows, [history()] * len(rows), [masks[i]] * len(rows), eos_ids=(5,)
            )
            assert {alone.tokens[0], alone.tokens[-1]} == {together.tokens[i]}
            assert {alone.logprobs[0], alone.logprobs[-1]} == {together.logprobs[i]}
            assert alone.top_logprobs[0] == together.top_logprobs[i]
        if masks[i] is not None:
            assert mask[together.tokens[i] // 8] >> together.tokens[i] % 8 & 1


def test_the_weights_of_a_row_are_the_same_in_any_company():
    params = [SamplingParams(**CASES[name], seed=i) for i, name in enumerate(TRUNCATIONS)]
    logits_NV = logits_of(2, len(params), 3000, scale=1.0)
    weights = sampling_weights(logits_NV, SamplingColumns.of(params))
    for i, one in enumerate(params):
        assert torch.equal(sampling_weights(logits_NV[[i, i]], SamplingColumns.of([one, one]))[0], weights[i])


def test_reported_log_probabilities_are_raw_and_agree_with_the_alternatives():
    logits_NV = logits_of(6, 5, 3000)
    params = [SamplingParams(temperature=0, logprobs=4), SamplingParams(seed=1, top_k=2, logprobs=2, repetition_penalty=3.0)] * 2
    params.append(SamplingParams(temperature=0, logit_bias={17: 100.0}, logprobs=1))
    chosen = choose_tokens(logits_NV, params, range(5), range(5), [history()] * 5)
    raw_NV = logits_NV.double().log_softmax(-1)
    for i in range(5):
        assert abs(chosen.logprobs[i] - raw_NV[i, chosen.tokens[i]].item()) < 2e-6
        assert len(chosen.top_logprobs[i]) == params[i].logprobs
        assert dict(chosen.top_logprobs[i]).get(chosen.tokens[i], chosen.logprobs[i]) == chosen.logprobs[i]
    assert chosen.tokens[4] == 17


def test_a_row_in_which_nothing_is_allowed_says_so():
    nothing = np.zeros(5, dtype=np.uint8)
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature), SamplingParams(temperature=temperature)]
        chosen = choose_tokens(logits_of(3, 2), params, [1, 2], [0, 0], masks=[nothing, None])
        assert chosen.tokens[0] == -1 and chosen.logprobs[0] == -np.inf and chosen.tokens[1] >= 0


def test_a_row_of_nan_gives_a_log_probability_that_is_nan():
    logits_NV = logits_of(3, 4, 3000)
    logits_NV[1, 700] = torch.nan
    logits_NV[2] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # a NaN with every bit set, as products may leave
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=5, typical_p=0.5)):
        logprobs = choose_tokens(logits_NV, [params] * 4, range(4), range(4)).logprobs
        assert [bool(np.isnan(value)) for value in logprobs] == [False, True, True, False]


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
    no_sums_N = torch.zeros(2)
    first, second = largest_logprobs(logprobs_NV, no_sums_N, 4)
    assert [token for token, _ in first] == [1, 2, 3, 4]
    assert [token for token, _ in second] == [0, 1, 2, 3]
    assert [value for _, value in first] == logprobs_NV[0, [1, 2, 3, 4]].tolist()
    assert largest_logprobs(logprobs_NV, no_sums_N, 9)[1] == [(i, logprobs_NV[1, i].item()) for i in range(5)]


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all", "typical", "typical of the rest", "nucleus of the likely"])
def test_transformers_warpers_keep_the_same_tokens(name):
    transformers = pytest.importorskip("transformers")
    case = {"temperature": 1.0} | CASES[name]
    logits_NV = logits_of(5, 6, 200)
    warpers = [transformers.TemperatureLogitsWarper(case["temperature"])]
    warpers += [transformers.TopKLogitsWarper(case["top_k"])] if "top_k" in case else []
    warpers += [transformers.TopPLogitsWarper(case["top_p"])] if "top_p" in case else []
    warpers += [transformers.MinPLogitsWarper(case["min_p"])] if "min_p" in case else []
    warpers += [transformers.TypicalLogitsWarper(case["typical_p"])] if "typical_p" in case else []
    scores = logits_NV
    for warper in warpers:
        scores = warper(None, scores)
    weights = sampling_weights(logits_NV, SamplingColumns.of([SamplingParams(**case)] * 6))
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), scores.softmax(-1), atol=1e-6, rtol=1e-5)
