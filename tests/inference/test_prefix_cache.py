"""Prompts share what they begin with: the same bits, read once, and known longer than any request runs."""

import pytest
import torch

from inference.runner_kinds import KINDS, VOCAB, make_kind, one_thread  # noqa: F401
from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=2)


def tokens_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine, *requests):
    """Run requests to their end; return the events of each."""
    ids = [engine.add(prompt, params) for prompt, params in requests]
    events = {request_id: [] for request_id in ids}
    while engine.num_active:
        for event in engine.step():
            events[event.id].append((event.token, event.logprob, event.top_logprobs, event.finish_reason))
    engine.check_integrity()
    return [events[request_id] for request_id in ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [31, 32, 33, 64, 100])
def test_a_hit_gives_the_bits_of_a_miss(make_model, kind, shared):
    runner, prefix = make_kind(kind, make_model), tokens_of(shared, 1)
    ends = [tokens_of(length, 2 + length) for length in (1, 20, 40)]
    missed = [run(Engine(runner, max_batch=2, prefix_caching=False), (prefix + end, GREEDY))[0] for end in ends]
    engine = Engine(runner, max_batch=2)
    hit = [run(engine, (prefix + end, GREEDY))[0] for end in ends]
    assert hit == missed
    assert engine.counters.cached_tokens == (len(ends) - 1) * (shared // 32 * 32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_again_reads_its_last_part_only(make_model, kind):
    runner, prompt = make_kind(kind, make_model), tokens_of(128, 1)
    engine = Engine(runner, max_batch=2)
    assert run(engine, (prompt, GREEDY)) == run(engine, (prompt, GREEDY))
    assert engine.counters.cached_tokens == 96  # the last token has to run, and its block with it


def test_with_a_uniform_runner_answers_are_found_too_and_with_another_they_are_not(make_model):
    for kind, expected in (("native", 64), ("torch", 32)):
        engine = Engine(make_kind(kind, make_model), max_batch=1)
        prompt = tokens_of(40, 3)
        answer = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=40))[0].tokens
        engine.generate([prompt + answer + [1]], GREEDY)
        assert engine.counters.cached_tokens == expected
        alone = Engine(make_kind(kind, make_model), prefix_caching=False)
        assert engine.generate([prompt + answer + [2]], GREEDY) == alone.generate([prompt + answer + [2]], GREEDY)


@pytest.mark.parametrize("kind", KINDS)
def test_completions_of_one_prompt_read_it_once(make_model, kind):
    runner, prompt = make_kind(kind, make_model), tokens_of(75, 4)
    each = [SamplingParams(seed=i, max_tokens=8, logprobs=1) for i in range(6)]
    engine = Engine(runner, max_batch=8)
    together = run(engine, *((prompt, params) for params in each))
    assert engine.counters.prompt_tokens == 6 * 75 and engine.counters.cached_tokens == 5 * 75
    alone = Engine(runner, max_batch=1, prefix_caching=False)
    assert together == [run(alone, (prompt, params))[0] for params in each]


def test_a_prompt_waits_for_the_prefix_that_is_being_read_and_others_do_not(make_model):
    engine = Engine(make_kind("torch", make_model, max_seq_len=2048), max_batch=8)
    prefix = tokens_of(900, 5)
    first, second = engine.add(prefix + [1], GREEDY), engine.add(prefix + [2, 3], GREEDY)
    other = engine.add([7, 8, 9], GREEDY)
    engine.step()
    assert engine.num_waiting == 1  # the second; the third got a place, and the prompt before it what a step reads
    seen = []
    while engine.num_active:
        seen += [event.id for event in engine.step()]
    assert {first, second, other} == set(seen) and engine.counters.cached_tokens == 896


def test_when_the_reader_is_cancelled_those_that_waited_go_on_from_what_it_read(make_model):
    engine = Engine(make_kind("torch", make_model, max_seq_len=2048), max_batch=4)
    prefix = tokens_of(900, 6)
    first, second = engine.add(prefix + [1], GREEDY), engine.add(prefix + [1], GREEDY)
    engine.step()
    assert engine.num_waiting == 1
    engine.cancel(first)
    while engine.num_active:
        assert {event.id for event in engine.step()} <= {second}
    assert engine.counters.cached_tokens == 512
    engine.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_find_nothing_of_the_old(make_model, kind):
    engine, prompt = Engine(make_kind(kind, make_model)), tokens_of(70, 7)
    before = engine.generate([prompt], GREEDY)
    model = make_model("grouped", vocab_size=VOCAB, head_dim=32, max_seq_len=256)
    with torch.no_grad():
        model.embed.weight.mul_(-1.0)
    engine.reload(model)
    fresh = Engine(type(engine.runner)(model), max_batch=2)
    assert engine.generate([prompt], GREEDY) == fresh.generate([prompt], GREEDY) != before
    with pytest.raises(UserError, match="same configuration"):
        engine.reload(make_model("grouped"))
    engine.add(prompt)
    with pytest.raises(RuntimeError, match="idle engine"):
        engine.reload(model)


def test_unused_prefixes_give_way_to_requests(make_model):
    runner = make_kind("torch", make_model)
    engine = Engine(runner, max_batch=2, max_seq_len=128)  # 12 blocks, four of them for scoring
    for seed in range(30):
        engine.generate([tokens_of(100, seed)], SamplingParams(temperature=0, max_tokens=28))
        engine.check_integrity()
        assert engine.pool.num_available == engine.pool.num_blocks == 12
    assert engine.pool.num_findable <= 12
