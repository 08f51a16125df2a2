"""Several completions of one prompt: what is chosen, what it costs, and search by steps."""

import itertools
import math

import pytest

from plinth.config import UserError
from plinth.inference.best_of import (
    Cost,
    StepSearch,
    best_of,
    cost_of,
    majority_vote,
    mean_logprob,
    sample,
    search_by_steps,
    total_logprob,
)
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextCompletion
from plinth.models.cost import forward_flops_per_token


def completion(text: str, *logprobs: float) -> TextCompletion:
    return TextCompletion(text, list(range(len(logprobs))), list(logprobs), [[] for _ in logprobs], "stop", 7)


SHORT, LONG, EMPTY = completion("no", -1.5), completion("a longer one", -0.5, -0.7, -0.6, -0.6), completion("")


def test_a_sum_of_log_probabilities_favours_short_answers_and_a_mean_does_not():
    assert best_of([LONG, SHORT], total_logprob) is SHORT
    assert best_of([SHORT, LONG], mean_logprob) is LONG
    assert best_of([LONG, EMPTY], total_logprob) is EMPTY and best_of([EMPTY, LONG], mean_logprob) is LONG
    assert best_of([SHORT, LONG], lambda one: len(one.text)) is LONG
    assert best_of([SHORT, completion("no", -1.5)], mean_logprob) is SHORT
    with pytest.raises(UserError, match="no completion"):
        best_of([], mean_logprob)


def test_votes_by_number_and_by_weight():
    texts = [completion(text, value) for text, value in (("4", -3.0), ("5 ", -0.1), (" 4", -3.0), ("none", -0.1))]
    answer = lambda text: text.strip() if text.strip().isdigit() else None  # noqa: E731
    vote = majority_vote(texts, answer)
    assert (vote.answer, vote.share, vote.weights) == ("4", 2 / 3, {"4": 2.0, "5": 1.0})
    weighted = majority_vote(texts, answer, lambda one: math.exp(total_logprob(one)))
    assert weighted.answer == "5" and weighted.share == pytest.approx(math.exp(-0.1) / (math.exp(-0.1) + 2 * math.exp(-3)))
    assert majority_vote(texts[3:], answer).answer is None
    with pytest.raises(UserError, match="negative"):
        majority_vote(texts, answer, total_logprob)


def test_cost_counts_the_prompt_once(make_model):
    config = make_model().config
    assert cost_of([SHORT, LONG, EMPTY]) == Cost(7, 5, 0)
    flops = 7 * forward_flops_per_token(config, 7) + forward_flops_per_token(config, 8) + 4 * forward_flops_per_token(config, 11)
    assert cost_of([SHORT, LONG], config).flops == flops
    assert cost_of([]) == Cost() and Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


def test_samples_share_one_reading_of_the_prompt_and_equal_single_ones(text_engine):
    prompt, params = "def main(argv): return 0 " * 2, SamplingParams(max_tokens=6, seed=5)
    before = (text_engine.engine.counters.prompt_tokens, text_engine.engine.counters.cached_tokens)
    samples = sample(text_engine, prompt, 4, params)
    counters = text_engine.engine.counters
    read, cached = counters.prompt_tokens - before[0], counters.cached_tokens - before[1]
    assert read == 4 * samples[0].prompt_tokens and cached >= 3 * samples[0].prompt_tokens
    assert [one.tokens for one in samples] == [
        text_engine.complete([prompt], SamplingParams(max_tokens=6, seed=5 + i))[0].tokens for i in range(4)
    ]
    with pytest.raises(UserError, match="n=0"):
        sample(text_engine, prompt, 0)


@pytest.fixture(scope="module")
def engine(make_model) -> Engine:
    return Engine(make_model(vocab_size=13, max_seq_len=64), max_batch=8, eos_ids=(0,))


def test_a_search_by_steps_keeps_what_the_scorer_likes(engine):
    """The scorer counts a token; with more candidates a step the kept ones hold more of it, and every step ends as asked."""
    score = lambda tokens: sum(token == 7 for token in tokens) / max(1, len(tokens))  # noqa: E731
    search, params = StepSearch(keep=3, expand=4, max_steps=4, max_step_tokens=6), SamplingParams(seed=1, temperature=2.0)
    kept, cost = search_by_steps(engine, [1, 2, 3], score, (5,), search, params)
    assert [partial.score for partial in kept] == sorted((score(partial.tokens) for partial in kept), reverse=True)
    assert len(kept) <= 3 and len({tuple(partial.tokens) for partial in kept}) == len(kept)
    for partial in kept:
        steps = [list(group) for is_end, group in itertools.groupby(partial.tokens, lambda token: token == 5) if not is_end]
        assert all(token not in (0,) for token in partial.tokens) and all(len(step) <= 4 * 6 for step in steps)
    assert cost.prompt_tokens == 3 and cost.completion_tokens <= 4 * 3 * 4 * 7
    plain, _ = search_by_steps(engine, [1, 2, 3], score, (5,), StepSearch(1, 1, 4, 6), params)
    assert kept[0].score >= plain[0].score
    assert search_by_steps(engine, [1, 2, 3], score, (5,), search, params)[0] == kept
    assert not engine.num_active


def test_a_search_by_steps_ends_at_the_models_end_and_at_the_context(engine):
    kept, _ = search_by_steps(engine, [1] * 60, lambda tokens: 0.0, (), StepSearch(2, 2, 9, 6), SamplingParams(seed=1))
    assert all(partial.ended and len(partial.tokens) <= 4 for partial in kept)
    with pytest.raises(UserError, match="expand=0"):
        StepSearch(expand=0)
