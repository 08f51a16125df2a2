"""Several rows a step: forced and guessed tokens change how many tokens a step gives, never which."""

import pytest
import torch

from inference.runner_kinds import KINDS, VOCAB, Guess, Rule, make_kind, one_thread  # noqa: F401
from plinth.inference.engine import Engine
from plinth.inference.sampling_params import SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, logprobs=2),
    SamplingParams(seed=5, max_tokens=40, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=2),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled with penalties"])
@pytest.mark.parametrize("ruled", [False, True])
def test_guesses_change_the_steps_not_the_tokens(make_model, kind, params, ruled):
    runner = make_kind(kind, make_model)
    rules = [Rule(skip=False)] if ruled else None
    plain = Engine(runner).generate([PROMPT], params, constraints=rules)
    drafter = Guess(PROMPT, plain[0].tokens)
    engine = Engine(runner)
    guessed = engine.generate([PROMPT], params, constraints=[Rule(skip=False)] if ruled else None, drafters=[drafter])
    assert guessed == plain
    assert engine.counters.steps < 25 and sum(accepted for _, accepted in drafter.heard) == engine.counters.accepted > 10
    engine.check_integrity()


def test_guesses_of_tokens_that_do_not_exist_are_dropped(make_model):
    runner, params = make_kind("torch", make_model), SamplingParams(temperature=0, max_tokens=6)
    plain = Engine(runner).generate([PROMPT], params)
    for wrong in (-1, VOCAB):
        guess = [plain[0].tokens[1], wrong, 3]
        drafter = Guess(PROMPT, [plain[0].tokens[0], *guess, 1, 2, 3], wrong_every=1)
        assert Engine(runner).generate([PROMPT], params, drafters=[drafter]) == plain
        assert drafter.heard[0] == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled with penalties"])
def test_forced_tokens_are_skipped_with_the_same_result(make_model, kind, params):
    runner = make_kind(kind, make_model)
    slow, fast = Engine(runner), Engine(runner)
    assert fast.generate([PROMPT], params, constraints=[Rule()]) == slow.generate([PROMPT], params, constraints=[Rule(skip=False)])
    assert fast.counters.forced_tokens > 3
    saved = slow.counters.steps - fast.counters.steps
    assert fast.counters.forced_tokens - 1 <= saved <= fast.counters.forced_tokens  # one less where max_tokens cuts a forced run


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9])
def test_a_finished_constraint_stops_with_its_last_token_in_the_answer(make_model, length):
    engine = Engine(make_kind("torch", make_model), eos_ids=(VOCAB - 1,))
    for skip in (True, False):
        rule = Rule(length, skip)
        done = engine.generate([PROMPT], SamplingParams(seed=2, max_tokens=30), constraints=[rule])[0]
        assert done.finish_reason == "stop" and len(done.tokens) == rule.count >= length and rule.finished()
    cut = engine.generate([PROMPT], SamplingParams(seed=2, max_tokens=length), constraints=[Rule(length + 5)])[0]
    assert cut.finish_reason == "length" and len(cut.tokens) == length


def test_a_constraint_that_is_finished_by_the_last_token_that_fits_is_not_cut_off(make_model):
    rule = Rule(6)
    whole = Engine(make_kind("torch", make_model)).generate([PROMPT], SamplingParams(seed=2, max_tokens=30), constraints=[rule])[0]
    exact = SamplingParams(seed=2, max_tokens=len(whole.tokens))
    assert Engine(make_kind("torch", make_model)).generate([PROMPT], exact, constraints=[Rule(6)])[0] == whole


def test_where_nothing_is_allowed_the_request_ends(make_model):
    class Closed(Rule):
        def allowed(self):
            return self._bits([])

    engine = Engine(make_kind("torch", make_model))
    done = engine.generate([PROMPT], SamplingParams(seed=2), constraints=[Closed()])[0]
    assert done.tokens == [] and done.finish_reason == "stop"
    engine.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_logprobs_are_the_scores_of_the_prompt(make_model, kind):
    runner = make_kind(kind, make_model)
    prompts = [torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (1, 40, 150)]
    engine = Engine(runner, max_batch=2)
    for prompt in prompts:  # the second time, when it could be found in the cache, too
        for _ in range(2):
            done = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2))[0]
            assert done.prompt_logprobs == engine.score_alternatives([prompt], 2)[0] and len(done.prompt_logprobs) == len(prompt) - 1
    assert engine.generate([prompts[1]], SamplingParams(max_tokens=1))[0].prompt_logprobs is None


def test_with_a_uniform_runner_scores_are_those_of_generating(make_model):
    engine = Engine(make_kind("native", make_model))
    done = engine.generate([PROMPT], SamplingParams(seed=4, max_tokens=50, logprobs=3))[0]
    scored = engine.score_alternatives([PROMPT + done.tokens], 3)[0][len(PROMPT) - 1 :]
    assert scored == list(zip(done.logprobs, done.top_logprobs))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_hidden_states(make_model, kind):
    runner = make_kind(kind, make_model)
    model = make_model("grouped", vocab_size=VOCAB, head_dim=32, max_seq_len=256)
    prompts = [[1], [2, 3, 4], list(range(60)), [5] * 200]
    engine = Engine(runner, max_batch=2)
    engine.add(prompts[3])
    engine.step()
    for pooling in ("mean", "last"):
        vectors = engine.embed(prompts, pooling)
        for prompt, vector in zip(prompts, vectors):
            assert torch.equal(engine.embed([prompt], pooling)[0], vector)
            with torch.no_grad():
                hidden = model(torch.tensor([prompt]))[0]
            expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
            tolerance = 1e-4 if kind == "torch" else 0.1 * expected.std().item() + 0.02
            torch.testing.assert_close(vector, expected, atol=tolerance, rtol=0)
