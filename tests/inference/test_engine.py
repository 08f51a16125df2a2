"""The engine's laws: cached equals uncached, a batch equals its singles bit for bit, blocks are conserved."""

import random

import pytest
import torch

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams

LENGTHS = (1, 2, 15, 16, 17, 40, 63, 64, 65, 130)
MIXED = [
    SamplingParams(temperature=0, max_tokens=9, logprobs=3),
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=2, max_tokens=30, top_k=20, logprobs=1),
    SamplingParams(seed=3, max_tokens=5, top_p=0.7),
    SamplingParams(seed=4, max_tokens=17, min_p=0.02, temperature=1.4),
]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def uncached_greedy(model, prompt, count):
    """The slow twin: run the whole sequence again for every token."""
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            distribution = torch.log_softmax(model.logits(model(torch.tensor([tokens]))[0, -1]).float(), -1)
            tokens.append(int(distribution.argmax()))
            logprobs.append(float(distribution[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("shape", ["grouped", "one kv head", "odd"])
def test_cached_decoding_equals_uncached(make_model, make_prompts, shape):
    model = make_model(shape)
    engine = Engine(model, max_batch=4)
    prompts = make_prompts((1, 5, 16, 33, 62, 120))
    for prompt, completion in zip(prompts, engine.generate(prompts, GREEDY)):
        tokens, logprobs = uncached_greedy(model, prompt, 12)
        assert completion.tokens == tokens
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(logprobs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["grouped", "one kv head", "odd", "real"])
def test_a_batch_equals_its_singles_bit_for_bit(make_model, make_prompts, shape, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = make_model(shape, dtype)
        prompts = make_prompts(LENGTHS, 211)
        params = [MIXED[i % len(MIXED)] for i in range(len(prompts))]
        together = Engine(model, max_batch=len(prompts)).generate(prompts, params)
        crowded = Engine(model, max_batch=3).generate(prompts[::-1], params[::-1])[::-1]
        single = Engine(model, max_batch=1)
        alone = [single.generate([prompt], [wanted])[0] for prompt, wanted in zip(prompts, params)]
        assert together == alone  # dataclasses of Python floats: equality is of every bit
        assert crowded == alone
    finally:
        torch.set_num_threads(before)


def test_joining_at_any_step_changes_nothing(make_model, make_prompts):
    model = make_model()
    prompts = make_prompts(LENGTHS * 2)
    params = [MIXED[i % len(MIXED)] for i in range(len(prompts))]
    alone = [Engine(model, max_batch=1).generate([prompt], [wanted])[0] for prompt, wanted in zip(prompts, params)]
    rng, engine = random.Random(0), Engine(model, max_batch=5)
    ids, got, pending = {}, {}, list(range(len(prompts)))
    while pending or engine.num_active:
        for _ in range(min(len(pending), rng.randrange(4))):
            i = pending.pop(0)
            ids[engine.add(prompts[i], params[i])] = i
        for event in engine.step():
            if event.finish_reason != "stop":
                got.setdefault(ids[event.id], []).append((event.token, event.logprob, event.top_logprobs))
    for i, completion in enumerate(alone):
        assert got[i] == list(zip(completion.tokens, completion.logprobs, completion.top_logprobs))


def test_random_arrivals_and_cancellations_conserve_blocks(make_model, make_prompts):
    model = make_model()
    rng, engine, alive = random.Random(1), Engine(model, max_batch=3), set()
    for _ in range(150):
        if rng.random() < 0.4:
            length = rng.randrange(1, 40)
            alive.add(engine.add(make_prompts([length])[0], SamplingParams(max_tokens=rng.randrange(1, 12), seed=rng.randrange(99))))
        if alive and rng.random() < 0.15:
            victim = rng.choice(sorted(alive))
            engine.cancel(victim)
            alive.discard(victim)
        events = engine.step()
        assert {event.id for event in events} <= alive
        assert len({event.id for event in events}) == len(events)
        alive -= {event.id for event in events if event.finish_reason}
        assert engine.num_active == len(alive)
        engine.check_integrity()
    for request_id in alive:
        engine.cancel(request_id)
        engine.cancel(request_id)
    assert engine.num_active == 0 and engine.step() == []
    engine.check_integrity()
    assert engine.pool.num_available == engine.pool.num_blocks


def test_cancel_frees_the_place_for_the_one_that_waits(make_model):
    engine = Engine(make_model(), max_batch=1)
    first, second = engine.add([1, 2, 3]), engine.add([4, 5], GREEDY)
    assert [event.id for event in engine.step()] == [first]
    assert engine.num_waiting == 1
    engine.cancel(first)
    assert [event.id for event in engine.step()] == [second]


def test_reported_logprobs_are_of_the_raw_distribution(make_model, make_prompts):
    model = make_model()
    prompt = make_prompts([20])[0]
    params = SamplingParams(temperature=0.3, top_k=3, seed=5, max_tokens=6, logprobs=4)
    completion = Engine(model).generate([prompt], params)[0]
    with torch.no_grad():
        raw = torch.log_softmax(model.logits(model(torch.tensor([prompt + completion.tokens])))[0, 19:-1].float(), -1)
    torch.testing.assert_close(torch.tensor(completion.logprobs), raw.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0],
                               atol=2e-5, rtol=1e-4)  # fmt: skip
    for row, top in zip(raw, completion.top_logprobs):
        assert [token for token, _ in top] == row.topk(4).indices.tolist()
    greedy = Engine(model).generate([prompt], SamplingParams(temperature=0, max_tokens=6, logprobs=1))[0]
    assert [top[0] for top in greedy.top_logprobs] == list(zip(greedy.tokens, greedy.logprobs))  # the same float


def test_seed_decides_and_no_seed_varies(make_model, make_prompts):
    engine = Engine(make_model(), max_batch=8)
    prompt = make_prompts([10])[0]
    seeded = SamplingParams(seed=9, max_tokens=20)
    a, b, c = engine.generate([prompt] * 3, [seeded, seeded, SamplingParams(seed=10, max_tokens=20)])
    assert a == b and a.tokens != c.tokens
    free = engine.generate([prompt] * 4, SamplingParams(max_tokens=20))
    assert len({tuple(completion.tokens) for completion in free}) == 4
    shared = engine.generate([prompt] * 2, seeded)  # one seed for several prompts: seed + i
    assert shared[0] == a and shared[1] == c


def test_stop_tokens_end_and_are_left_out(make_model, make_prompts):
    model = make_model()
    prompt = make_prompts([12])[0]
    free = Engine(model).generate([prompt], GREEDY)[0]
    at = next(i for i in range(2, 12) if free.tokens[i] not in free.tokens[:i])
    for engine, params in (
        (Engine(model, eos_ids=(free.tokens[at],)), GREEDY),
        (Engine(model), SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(free.tokens[at],))),
    ):
        stopped = engine.generate([prompt], params)[0]
        assert stopped.tokens == free.tokens[:at] and stopped.finish_reason == "stop"
        assert stopped.logprobs == free.logprobs[:at]


def test_context_bounds_the_completion(make_model, make_prompts):
    model = make_model(max_seq_len=40)
    engine = Engine(model, max_batch=2)
    near, full = engine.generate(make_prompts((35, 39)), SamplingParams(temperature=0, max_tokens=50))
    assert (len(near.tokens), near.finish_reason) == (5, "length")
    assert (len(full.tokens), full.finish_reason) == (1, "length")
    assert near.tokens == uncached_greedy(model, make_prompts((35, 39))[0], 5)[0]
    with pytest.raises(UserError, match="prompt has 40 tokens; the context of 40 tokens holds a prompt of at most 39"):
        engine.generate(make_prompts([40]))
    assert engine.num_active == 0


@pytest.mark.parametrize(
    "prompt, says", [([], "prompt is empty"), ([211], "token id 211; the vocabulary has ids 0 to 210"), ([-1], "id -1")]
)
def test_wrong_prompts_are_named(make_model, prompt, says):
    engine = Engine(make_model())
    with pytest.raises(UserError, match=says):
        engine.generate([[1, 2], prompt])
    assert engine.num_active == 0


def test_memory_bound_makes_requests_wait(make_model, make_prompts):
    model = make_model()
    full = Engine(model, max_batch=8)
    bounded = Engine(model, max_batch=8, max_cache_bytes=full.runner.cache.bytes // 3)
    assert bounded.runner.cache.bytes <= full.runner.cache.bytes // 3
    prompts = make_prompts([200] * 8)  # of seven blocks each: four would fit in 26 blocks, but eight are kept for scoring
    ids = [bounded.add(prompt, GREEDY) for prompt in prompts]
    bounded.step()
    assert bounded.num_waiting > 4
    bounded.cancel(ids[0])
    bounded.step()
    assert bounded.num_waiting > 3
    for request_id in ids:
        bounded.cancel(request_id)
    assert bounded.generate(prompts, GREEDY) == full.generate(prompts, GREEDY)
    bounded.check_integrity()
    with pytest.raises(UserError, match="max_cache_bytes=1000 is less than"):
        Engine(model, max_cache_bytes=1000)


def test_scores_are_teacher_forced_logprobs(make_model, make_prompts):
    model = make_model()
    sequences = make_prompts((2, 1, 16, 17, 33, 64, 256, 100))
    engine = Engine(model, max_batch=3)
    scores = engine.score(sequences)
    for sequence, scored in zip(sequences, scores):
        with torch.no_grad():
            raw = torch.log_softmax(model.logits(model(torch.tensor([sequence])))[0].float(), -1)
        expected = raw[:-1].gather(1, torch.tensor(sequence[1:], dtype=torch.int64)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored), expected, atol=3e-5, rtol=1e-4)
    assert [engine.score([sequence])[0] for sequence in sequences] == scores  # bit for bit
    with pytest.raises(UserError, match="sequence has 257 tokens"):
        engine.score(make_prompts([257]))


def test_scoring_does_not_disturb_running_requests(make_model, make_prompts):
    model = make_model()
    prompts = make_prompts((20, 50))
    expected = Engine(model).generate(prompts, GREEDY)
    engine = Engine(model, max_batch=2)
    ids = [engine.add(prompt, GREEDY) for prompt in prompts]
    got = {request_id: [] for request_id in ids}
    while engine.num_active:
        for event in engine.step():
            got[event.id].append((event.token, event.logprob))
        assert len(engine.score(make_prompts((30, 60, 10)))) == 3
    assert [got[i] for i in ids] == [list(zip(completion.tokens, completion.logprobs)) for completion in expected]


def test_long_prompts_are_read_over_several_steps_while_others_decode(make_model, make_prompts):
    model = make_model(max_seq_len=1024)
    long, short = make_prompts((900, 5))
    engine = Engine(model, max_batch=2)
    first, second = engine.add(short, GREEDY), engine.add(long, GREEDY)
    assert [event.id for event in engine.step()] == [first]
    assert [event.id for event in engine.step()] == [first]
    assert sorted(event.id for event in engine.step()) == [first, second]
    engine.cancel(first), engine.cancel(second)
    tokens, _ = uncached_greedy(model, long, 3)
    assert engine.generate([long], SamplingParams(temperature=0, max_tokens=3))[0].tokens == tokens


def test_weights_that_are_not_numbers_are_named(make_model):
    model = make_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan")) if model.final_norm.weight is not None else model.embed.weight.fill_(float("nan"))
    engine = Engine(model)
    with pytest.raises(UserError, match="not numbers"):
        engine.generate([[1, 2]])
    assert engine.num_active == 0
