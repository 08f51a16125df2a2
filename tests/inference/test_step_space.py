"""Generation token by token: the same as the engine's and as searching without a cache, whatever the grouping of the calls."""

from dataclasses import dataclass

import pytest
import torch

from plinth.config import UserError
from plinth.inference.beam import BeamParams, beam_search
from plinth.inference.engine import Engine
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.step_space import StepSpace, sample_sequences

START, EOS = 60, 5


@dataclass(frozen=True)
class Written:
    """Tokens so far of each row, in lists: rows of unequal length, so nothing is shared by accident."""

    rows: tuple[tuple[int, ...], ...]

    def select(self, rows_B):
        return Written(tuple(self.rows[i] for i in rows_B.tolist()))


class Recomputing:
    """A decoder that reads everything anew at each step; as an encoder-decoder it reads the source, then what it wrote."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def encode(self, source_BS, source_mask_BS):
        return [tuple(row[mask].tolist()) for row, mask in zip(source_BS, source_mask_BS)]

    def begin(self, memory, rows):
        return Written(tuple(memory) if memory is not None else ((),) * rows)

    def step(self, tokens_B, state):
        self.calls += 1
        written = Written(tuple((*row, token) for row, token in zip(state.rows, tokens_B.tolist())))
        logits = [self.model.logits(self.model(torch.tensor([row])))[0, -1].float() for row in written.rows]
        return torch.stack(logits), written


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab_size=61, max_seq_len=64)


@pytest.fixture(scope="module")
def prompts(make_prompts):
    return make_prompts([4, 7, 4, 1], vocab_size=60)


def test_sampling_gives_what_the_engine_gives(model, prompts):
    engine = Engine(model, max_batch=4, eos_ids=(EOS,))
    for params in (
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(seed=3, max_tokens=12, top_k=20, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=3, logprobs=2),
    ):
        expected = engine.generate(prompts, params)
        got = sample_sequences(Recomputing(model), prompts, params, (EOS,))
        assert [one.tokens for one in got] == [one.tokens for one in expected]
        assert [one.finish_reason for one in got] == [one.finish_reason for one in expected]
        assert [one.prompt_tokens for one in got] == [len(prompt) for prompt in prompts]
        for ours, theirs in zip(got, expected):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            assert [[token for token, _ in top] for top in ours.top_logprobs] == [
                [token for token, _ in top] for top in theirs.top_logprobs
            ]


def test_an_encoder_decoder_reads_its_source_and_starts_from_its_start(model, prompts):
    params = SamplingParams(seed=1, max_tokens=10)
    as_sources = sample_sequences(Recomputing(model), prompts, params, (EOS,), start_id=START)
    as_prompts = sample_sequences(Recomputing(model), [[*prompt, START] for prompt in prompts], params, (EOS,))
    assert [one.tokens for one in as_sources] == [one.tokens for one in as_prompts]


def test_beam_search_runs_on_it_as_on_the_engine(model, prompts):
    engine = Engine(model, max_batch=16, eos_ids=(EOS,))
    for params in (
        BeamParams(num_beams=4, max_tokens=8, num_return=2),
        BeamParams(num_beams=4, num_groups=2, diversity_penalty=0.7, max_tokens=6),
    ):
        with engine.search() as expected_space:
            expected = beam_search(expected_space, prompts, params, (EOS,))
        space = StepSpace(Recomputing(model))
        found = beam_search(space, prompts, params, (EOS,))
        assert not space.num_sequences, "every sequence is freed"
        assert [[beam.tokens for beam in beams] for beams in found] == [[beam.tokens for beam in beams] for beams in expected]


def test_prepared_prompts_run_as_one_call_and_give_the_same(model, prompts):
    params, alone, together = BeamParams(num_beams=3, max_tokens=6), Recomputing(model), Recomputing(model)
    one_by_one = beam_search(StepSpace(alone, START), prompts, params, (EOS,))
    space = StepSpace(together, START)
    space.prepare(prompts)
    assert beam_search(space, prompts, params, (EOS,)) == one_by_one
    assert together.calls < alone.calls / 2


def test_sequences_of_several_states_extend_in_the_order_of_the_call(model, prompts):
    space = StepSpace(Recomputing(model))
    handles = [space.start(prompt)[0] for prompt in prompts]
    order, tokens = [2, 0, 3, 1], [9, 8, 7, 6]
    logits = space.extend([handles[i] for i in order], tokens)
    for row, i, token in zip(logits, order, tokens):
        assert torch.equal(row, StepSpace(Recomputing(model)).start([*prompts[i], token])[1])


def test_a_fork_goes_on_by_itself(model):
    space = StepSpace(Recomputing(model))
    handle, _ = space.start([1, 2, 3])
    other = space.fork(handle)
    space.extend([handle], [4])
    assert torch.equal(space.extend([other], [5])[0], space.start([1, 2, 3, 5])[1])
    assert torch.equal(space.extend([handle], [6])[0], space.start([1, 2, 3, 4, 6])[1])


def test_a_prompt_that_leaves_no_room_is_refused(model):
    with pytest.raises(UserError, match="prompt is empty"):
        StepSpace(Recomputing(model)).start([])
    with pytest.raises(UserError, match="leaves no room"):
        sample_sequences(Recomputing(model), [[1, 2, 3]], SamplingParams(), max_seq_len=3)
    short = sample_sequences(Recomputing(model), [[1, 2, 3]], SamplingParams(ignore_eos=True), max_seq_len=8)[0]
    assert len(short.tokens) == 5 and short.finish_reason == "length"
