"""Kept answers: equal to computed ones bit for bit, only where they would come out the same, bounded, shared, never of other weights."""

import dataclasses
import threading

import pytest

from plinth.config import UserError
from plinth.inference.answer_cache import AnswerCache, sketch
from plinth.inference.engine import Engine
from plinth.inference.request import Event
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.text import TextEngine

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
SEEDED = SamplingParams(seed=5, max_tokens=12, top_p=0.9)


@pytest.fixture
def cached(make_model, tmp_path):
    engine = Engine(make_model(), max_batch=4, eos_ids=(0,))
    engine.answers = AnswerCache(tmp_path / "answers.db", {"weights": "a"})
    return engine


def events_of(tokens):
    return [Event(-1, token, -0.5, [(token, -0.5)], "length" if i == len(tokens) - 1 else None) for i, token in enumerate(tokens)]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_kept_answer_is_the_computed_one_bit_for_bit(cached, make_model, make_prompts, params):
    prompts = make_prompts([5, 40])
    alone = Engine(make_model(), max_batch=4, eos_ids=(0,)).generate(prompts, params)
    first = cached.generate(prompts, params)
    steps = cached.counters.steps
    second = cached.generate(prompts, params)
    assert first == second == alone
    assert cached.counters.steps == steps and cached.counters.known_answers == 2
    assert (cached.answers.exact_hits, cached.answers.misses) == (2, 2)


def test_what_would_differ_each_time_is_not_kept(cached, make_prompts):
    cached.generate(make_prompts([5]), SamplingParams(max_tokens=4))
    assert len(cached.answers) == 0


def test_every_parameter_the_prompt_and_the_weights_belong_to_the_key(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", {"weights": "a"})
    key = cache.key([1, 2], SEEDED)
    changed = {"temperature": 0.5, "top_k": 3, "top_p": 0.8, "max_tokens": 13, "seed": 6, "stop": ("x",), "logprobs": 1, "min_tokens": 2,
               "logit_bias": ((3, 1.0),), "presence_penalty": 0.5}  # fmt: skip
    keys = {cache.key([1, 2], dataclasses.replace(SEEDED, **{name: value})) for name, value in changed.items()}
    keys |= {cache.key([1, 3], SEEDED), AnswerCache(tmp_path / "answers.db", {"weights": "b"}).key([1, 2], SEEDED)}
    assert len(keys) == len(changed) + 2 and key not in keys
    greedy = dataclasses.replace(SEEDED, temperature=0.0)
    assert cache.key([1], greedy) == cache.key([1], dataclasses.replace(greedy, seed=None))  # a seed changes no greedy answer


def test_an_answer_that_a_stop_string_ends_is_kept_and_an_abandoned_one_is_not(make_model, tokenizer, tmp_path):
    text = TextEngine(Engine(make_model(vocab_size=tokenizer.vocab_size), max_batch=2), tokenizer)
    plain = text.complete(["naïve"], dataclasses.replace(GREEDY, max_tokens=30))[0].text
    stop = dataclasses.replace(GREEDY, max_tokens=30, stop=(plain[4:6],))
    text.engine.answers = AnswerCache(tmp_path / "answers.db", {})
    computed = text.complete(["naïve"], stop)
    streamed = "".join(delta.text for delta in text.stream("naïve", stop))
    assert text.complete(["naïve"], stop) == computed and streamed == computed[0].text == plain[: plain.index(plain[4:6])]
    assert text.engine.counters.known_answers == 2
    stream = text.stream("another", GREEDY)
    next(stream)
    stream.close()
    assert len(text.engine.answers) == 1 and text.engine.num_active == 0
    text.engine.check_integrity()


def test_a_kept_answer_can_be_cancelled(cached, make_prompts):
    prompt = make_prompts([6])[0]
    cached.generate([prompt], GREEDY)
    kept = cached.add(prompt, GREEDY)
    assert cached.num_active == 1
    cached.cancel(kept)
    assert cached.num_active == 0 and cached.step() == []


def test_the_answers_used_longest_ago_go(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", {}, max_bytes=300)
    for token in range(1, 20):
        cache.put([token], GREEDY, events_of([token] * 2))
        assert cache.get([token], GREEDY) is not None
        assert token == 1 or cache.get([1], GREEDY) is not None  # used each time, so it stays
    assert 2 <= len(cache) < 19 and cache.get([2], GREEDY) is None


def test_many_threads_share_a_file(tmp_path):
    def work(first):
        cache = AnswerCache(tmp_path / "answers.db", {})
        for token in range(first, first + 20):
            cache.put([token], GREEDY, events_of([token]))
        cache.close()

    threads = [threading.Thread(target=work, args=(20 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = AnswerCache(tmp_path / "answers.db", {})
    assert len(cache) == 80 and cache.get([33], GREEDY)[0].token == 33


def test_a_like_prompt_takes_the_answer_only_by_option(tmp_path):
    prompt, like, other = [list(range(start, start + 30)) for start in (0, 1, 100)]
    for min_likeness, hit in ((None, False), (0.9, True), (0.9999, False)):
        cache = AnswerCache(tmp_path / f"{min_likeness}.db", {}, min_likeness=min_likeness)
        cache.put(prompt, GREEDY, events_of([7]))
        assert (cache.get(like, GREEDY) is not None) is hit
        assert cache.get(other, GREEDY) is None
        assert cache.get(like, dataclasses.replace(GREEDY, max_tokens=5)) is None  # decoding must be equal all the same
        assert cache.like_hits == hit
    assert float(sketch(prompt) @ sketch(prompt)) == pytest.approx(1.0)


def test_mistakes_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database" * 100)
    with pytest.raises(UserError, match="notes.txt is no cache of answers"):
        AnswerCache(tmp_path / "notes.txt", {})
    with pytest.raises(UserError, match="min_likeness=1.5"):
        AnswerCache(tmp_path / "a.db", {}, min_likeness=1.5)
    with pytest.raises(UserError, match="max_bytes=0"):
        AnswerCache(tmp_path / "a.db", {}, max_bytes=0)
