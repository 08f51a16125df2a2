"""Speculation: the same answers as without, guesses that are right where they can be, and a pause where they do not pay."""

import itertools

import numpy as np
import pytest
from scipy import stats

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams, target_distribution
from plinth.inference.speculative import DraftModel, PromptLookup, Speculation, WhileItPays


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab_size=61, max_seq_len=128)


@pytest.fixture(scope="module")
def small(make_model):
    return make_model("one kv head", vocab_size=61, max_seq_len=128)


PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "sampled": SamplingParams(temperature=0.7, top_p=0.95, seed=4, max_tokens=40),
    "penalised": SamplingParams(temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.2, seed=5, max_tokens=40, logprobs=2),
}


def test_lookup_finds_the_longest_and_latest_match():
    lookup = PromptLookup(num_tokens=3)
    assert lookup.propose([1, 2, 3, 4, 9, 2, 3], 8) == [4, 9, 2]
    assert lookup.propose([1, 2, 3, 4, 9, 2, 3, 5, 2, 3], 8) == [5, 2, 3]  # the later of two
    assert PromptLookup(3).propose([7, 2, 3, 1, 8, 2, 3, 5, 7, 2, 3], 8) == [1, 8, 2]  # the longer before the later
    assert lookup.propose([1, 2, 3, 4, 9, 2, 3, 5, 2, 3, 40], 8) == []
    assert PromptLookup(8).propose([5, 5, 5], 2) == [5]
    assert PromptLookup(8).propose([], 2) == PromptLookup(8).propose([1], 2) == []


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("kind", ["lookup", "small", "itself"])
def test_answers_are_the_same_as_without(model, small, make_prompts, name, kind):
    draft = {"lookup": None, "small": small, "itself": model}[kind]
    speculation = Speculation(Engine(draft, max_batch=12) if draft else None, only_while_it_pays=False)
    prompts, params = make_prompts([5, 33, 60], 61), PARAMS[name]
    each = [params if params.seed is None else SamplingParams(**{**vars_of(params), "seed": params.seed + i}) for i in range(3)]
    plain = Engine(model, max_batch=4, eos_ids=(5,)).generate(prompts, each)
    engine = Engine(model, max_batch=4, eos_ids=(5,))
    drafters = [speculation.drafter(p, p.seed or 0, len(prompt)) for p, prompt in zip(each, prompts)]
    assert engine.generate(prompts, each, drafters=drafters) == plain
    assert engine.counters.drafted >= engine.counters.accepted
    if kind == "itself" and name != "penalised":
        assert engine.counters.accepted > 0.9 * engine.counters.drafted > 0
    engine.check_integrity()
    if speculation.draft is not None:
        del drafters
        assert speculation.draft.pool.num_available == speculation.draft.pool.num_blocks, "the drafters' sequences are freed"


def vars_of(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


def test_pairs_of_sampled_tokens_follow_the_exact_distribution(make_model):
    """Chi-square over the first two tokens of many requests, guessed for by another model."""
    model, other = make_model(vocab_size=6, max_seq_len=32), make_model("one kv head", vocab_size=6, max_seq_len=32)
    prompt, draws = [1, 2, 3], 1500
    params = [SamplingParams(temperature=0.8, top_p=0.9, max_tokens=2, seed=i) for i in range(draws)]
    engine, speculation = Engine(model, max_batch=64), Speculation(Engine(other, max_batch=64 * 4), 1, only_while_it_pays=False)
    drafters = [speculation.drafter(p, p.seed, 3) for p in params]
    found = [tuple(completion.tokens) for completion in engine.generate([prompt] * draws, params, drafters=drafters)]

    def distribution(tokens):
        with engine.search() as space:
            return target_distribution(space.start(tokens)[1].tolist(), params[0])

    first = distribution(prompt)
    expected = {(a, b): first[a] * p for a in range(6) if first[a] for b, p in enumerate(distribution([*prompt, a]))}
    counts = np.array([found.count(pair) for pair in expected])
    weights = np.array(list(expected.values())) * draws
    assert counts[weights == 0].sum() == 0 and counts.sum() == draws
    rare = weights < 5
    counts, weights = np.append(counts[~rare], counts[rare].sum()), np.append(weights[~rare], weights[rare].sum())
    assert stats.chisquare(counts[weights > 0], weights[weights > 0]).pvalue > 1e-3


def test_a_draft_model_passes_where_its_cache_or_context_is_full(model):
    engine = Engine(model, max_batch=8, max_seq_len=32)
    drafter = DraftModel(engine.search(), engine.max_seq_len, PARAMS["greedy"], 0, 20)
    assert len(drafter.propose([1] * 20, 8)) == 4
    assert drafter.propose([1] * 32, 8) == []
    with engine.search() as space:
        taken = []
        while engine.pool.num_available:
            taken.append(space.start([len(taken)] * 3)[0])
        late = DraftModel(engine.search(), engine.max_seq_len, PARAMS["greedy"], 0, 20)
        assert late.propose([1] * 24, 8) == []
    assert len(late.propose([1] * 24, 8)) == 4


class Counting:
    """A drafter that always guesses, and a clock that the guesses move."""

    def __init__(self, plain_s: float, guessed_s: float):
        self.now, self.plain_s, self.guessed_s, self.asked = 0.0, plain_s, guessed_s, 0

    def propose(self, tokens, count):
        self.asked += 1
        return [1] * count

    def observe(self, proposed, accepted):
        pass

    def run(self, steps: int, accepted: int) -> int:
        """Return how many of the steps guessed."""
        paying, guesses = WhileItPays(self, lambda: self.now), 0
        for _ in range(steps):
            guess = paying.propose([0], 4)
            self.now += self.guessed_s if guess else self.plain_s
            if guess:
                paying.observe(4, accepted)
                guesses += 1
        return guesses


def test_guessing_goes_on_while_it_pays_and_pauses_longer_and_longer_where_not():
    assert Counting(1.0, 1.5).run(1000, accepted=2) > 900
    assert Counting(1.0, 1.5).run(1000, accepted=0) < 60
    assert Counting(1.0, 5.5).run(1000, accepted=4) < 60
    assert Counting(1.0, 4.5).run(1000, accepted=4) > 900


def test_an_engine_guesses_for_every_request_that_brings_no_drafter(model, make_prompts):
    prompts = make_prompts([20, 9], 61)
    plain = Engine(model, max_batch=4).generate(prompts, PARAMS["sampled"])
    engine = Engine(model, max_batch=4)
    engine.drafting = Speculation(only_while_it_pays=False).drafter
    assert engine.generate(prompts, PARAMS["sampled"]) == plain
    assert engine.counters.drafted > 0


def test_wrong_settings_are_named(model, make_model):
    with pytest.raises(UserError, match="draft_tokens=16 is not between 1 and 15"):
        Speculation(num_tokens=16)
    with pytest.raises(UserError, match="61 token ids, the model 50"):
        Speculation(Engine(model)).check(Engine(make_model(vocab_size=50)))


def test_a_pause_changes_no_answer(model, make_prompts):
    ticks = itertools.count()
    prompts = make_prompts([6, 12], 61)
    drafters = [WhileItPays(PromptLookup(), lambda: next(ticks) ** 2 % 7) for _ in prompts]
    engine = Engine(model, max_batch=4)
    plain = Engine(model, max_batch=4).generate(prompts, PARAMS["sampled"])
    assert engine.generate(prompts, PARAMS["sampled"], drafters=drafters) == plain
