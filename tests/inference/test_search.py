"""A space of sequences: what it gives for a sequence is what a request would get, and forks cost no block until they grow."""

import pytest
import torch

from inference.runner_kinds import KINDS, VOCAB, make_kind, one_thread  # noqa: F401
from plinth.config import UserError
from plinth.inference.blocks import OutOfBlocks
from plinth.inference.engine import Engine
from plinth.inference.sampling_params import SamplingParams

PROMPT = list(range(1, 60))


@pytest.mark.parametrize("kind", KINDS)
def test_a_greedy_walk_is_a_greedy_request(make_model, kind):
    runner = make_kind(kind, make_model)
    expected = Engine(runner).generate([PROMPT], SamplingParams(temperature=0, max_tokens=40))[0]
    engine = Engine(runner)
    with engine.search() as space:
        handle, logits = space.start(PROMPT)
        tokens, logprobs = [], []
        for _ in range(40):
            tokens.append(int(logits.argmax()))
            logprobs.append(float(torch.log_softmax(logits, -1)[tokens[-1]]))
            logits = space.extend([handle], tokens[-1:])[0]
        assert space.tokens(handle) == PROMPT + tokens
    assert tokens == expected.tokens
    assert logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    engine.check_integrity()
    assert engine.pool.num_available == engine.pool.num_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_forks_go_their_own_ways(make_model, kind):
    runner = make_kind(kind, make_model)
    ways = [[7, 8, 9, 10], [7, 8, 1, 2], [50, 51, 52, 53]]

    def alone(way):
        with Engine(runner).search() as space:
            handle, _ = space.start(PROMPT)
            return [space.extend([handle], [token])[0].clone() for token in way]

    expected = [alone(way) for way in ways]
    with Engine(runner).search() as space:
        first, _ = space.start(PROMPT)
        space_available = space._pool.num_available
        handles = [first, space.fork(first), space.fork(first)]
        assert space._pool.num_available == space_available
        for step in range(4):
            logits = space.extend(handles, [way[step] for way in ways])
            for got, wanted in zip(logits, expected):
                assert torch.equal(got, wanted[step])
        assert space._pool.num_available == space_available - 2  # the part-full block of two of them
        space.free(handles[1])
        assert space._pool.num_available == space_available - 1
        branch = space.fork(handles[0])
        assert torch.equal(space.extend([branch], [3]), space.extend([handles[0]], [3]))


def test_search_beside_requests_disturbs_neither(make_model):
    runner = make_kind("torch", make_model)
    params = SamplingParams(seed=3, max_tokens=20)
    expected = Engine(runner).generate([PROMPT], params)[0].tokens
    engine = Engine(runner, max_batch=2)
    engine.add(PROMPT, params)
    tokens = [event.token for event in engine.step()]
    with engine.search() as space:
        handle, logits = space.start(PROMPT)
        assert engine.pool.num_findable == 1  # the prompt's first block, which the request wrote
        while engine.num_active:
            logits = space.extend([handle], [int(logits.argmax())])[0]
            tokens += [event.token for event in engine.step()]
    assert tokens == expected
    engine.check_integrity()


def test_no_room_is_an_error_that_changes_nothing(make_model):
    engine = Engine(make_kind("torch", make_model, max_seq_len=64), max_batch=1)  # four blocks
    with engine.search() as space:
        first, _ = space.start(PROMPT)
        others = [space.fork(first) for _ in range(3)]
        with pytest.raises(OutOfBlocks, match="3 blocks are needed and 2 are free"):
            space.extend([first, *others], [1, 2, 3, 4])
        with pytest.raises(OutOfBlocks):
            space.start([VOCAB - 1] * 64 + []) and space.start([9] * 64)
        for handle in others:
            space.free(handle)
        for token in range(5):
            space.extend([first], [token])
        with pytest.raises(OutOfBlocks, match="64 tokens already"):
            space.extend([first], [5])
        with pytest.raises(UserError, match="prompt is empty"):
            space.start([])
        with pytest.raises(OutOfBlocks, match="open search"):
            engine.score([[1] * 64])
        with pytest.raises(OutOfBlocks, match="1 requests wait for blocks that an open search holds"):
            engine.generate([[1, 2]])
    assert engine.pool.num_available == engine.pool.num_blocks
