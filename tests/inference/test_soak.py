"""Requests of every kind, joining, leaving and sharing at random: each gets what it gets alone, and no block is lost.

The number of requests is SOAK_REQUESTS (`make soak` runs 10,000 on each runner).
"""

import os
import random
from dataclasses import replace

import pytest

from inference.runner_kinds import KINDS, VOCAB, Guess, Rule, make_kind, one_thread  # noqa: F401
from plinth.inference.engine import Engine
from plinth.inference.sampling_params import SamplingParams

EOS = 5
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "800"))


def random_params(rng: random.Random) -> SamplingParams:
    params = SamplingParams(temperature=rng.choice([0.0, 0.7, 1.3]), seed=rng.randrange(1000), max_tokens=rng.randrange(1, 14))
    options = [
        {"top_k": rng.randrange(1, 20)},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"frequency_penalty": 0.6},
        {"logit_bias": ((3, 2.0), (9, -4.0))},
        {"min_tokens": 1},
        {"ignore_eos": True},
        {"logprobs": 3},
        {"prompt_logprobs": 1},
        {"stop_token_ids": (11, 12)},
    ]
    for option in rng.sample(options, rng.choice([0, 0, 1, 2])):
        params = replace(params, **option)
    return params


class Case:
    """One request, and what it gets alone: without a cache, without skipping, without guesses."""

    def __init__(self, rng: random.Random, prefixes, alone: Engine):
        prefix = rng.choice(prefixes)
        self.prompt = prefix[: rng.randrange(len(prefix) + 1)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        if rng.random() < 0.2:
            self.prompt = prefix
        self.params = random_params(rng)
        self.length = rng.choice([None, None, 5]) if rng.random() < 0.3 else -1
        self.expected = self.run_alone(alone)
        self.drafter = Guess(self.prompt, [token for token, *_ in self.expected], rng.randrange(3, 7)) if rng.random() < 0.3 else None
        self.got, self.cancel_after = [], rng.randrange(6) if rng.random() < 0.15 else None

    def rule(self, skip: bool = True):
        return None if self.length == -1 else Rule(self.length, skip)

    def run_alone(self, engine: Engine):
        engine.add(self.prompt, self.params, self.rule(skip=False))
        events = []
        while engine.num_active:
            events += engine.step()
        return [signature(event) for event in events]


def signature(event):
    return event.token, event.logprob, event.top_logprobs, event.finish_reason, event.prompt_logprobs


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_equals_its_lone_twin(make_model, kind):
    rng = random.Random(REQUESTS)
    alone = Engine(make_kind(kind, make_model), max_batch=1, eos_ids=(EOS,), prefix_caching=False)
    engine = Engine(make_kind(kind, make_model), max_batch=6, eos_ids=(EOS,), max_cache_bytes=None)
    prefixes = [[rng.randrange(VOCAB) for _ in range(length)] for length in (3, 31, 32, 64, 100, 200)]
    running, pending, seen = {}, REQUESTS, 0
    while pending or engine.num_active:
        for _ in range(min(pending, rng.choice([0, 0, 1, 2, 5]))):
            case = Case(rng, prefixes, alone)
            running[engine.add(case.prompt, case.params, case.rule(), case.drafter)] = case
            pending -= 1
        for event in engine.step():
            running[event.id].got.append(signature(event))
        for request_id, case in list(running.items()):
            if case.cancel_after is not None and len(case.got) > case.cancel_after:
                engine.cancel(request_id)
                assert case.got == case.expected[: len(case.got)]
                del running[request_id]
            elif case.got and case.got[-1][3]:
                assert case.got == case.expected
                del running[request_id]
                seen += 1
        disturb(rng, engine, prefixes)
        engine.check_integrity()
    assert not running and seen > REQUESTS // 2
    assert engine.pool.num_available == engine.pool.num_blocks
    assert engine.counters.cached_tokens > 0 and engine.counters.forced_tokens > 0
    assert 0 < engine.counters.accepted < engine.counters.drafted


def disturb(rng: random.Random, engine: Engine, prefixes) -> None:
    """Score, embed and search beside the requests, now and then."""
    roll = rng.random()
    if roll < 0.05:
        engine.score([rng.choice(prefixes), rng.choice(prefixes)[:7]])
    elif roll < 0.08:
        engine.embed([rng.choice(prefixes)])
    elif roll < 0.12:
        with engine.search() as space:
            handle, _ = space.start(rng.choice(prefixes))
            other = space.fork(handle)
            space.extend([handle, other], [1, 2])
