"""Beam search: transformers' results on the same weights, a slow twin for groups, and what it costs the cache."""

import itertools
from collections import Counter

import pytest
import torch

from plinth.config import UserError
from plinth.inference.beam import BeamParams, beam_search
from plinth.inference.engine import Engine
from plinth.models.hub import save_model

GRID = [(1, 1.0, False), (2, 0.6, False), (2, -1.0, "never"), *itertools.product([4], [0.0, 1.0, 2.0], [True, False, "never"])]


class PlainSpace:
    """Sequences without a cache: every call runs them whole."""

    def __init__(self, model):
        self.model, self.sequences = model, {}

    def start(self, prompt):
        return self._new(list(prompt)), self._logits(list(prompt))

    def _new(self, tokens):
        handle = max(self.sequences, default=0) + 1
        self.sequences[handle] = tokens
        return handle

    @torch.no_grad()
    def _logits(self, tokens):
        return self.model.logits(self.model(torch.tensor([tokens])))[0, -1].float()

    def extend(self, handles, tokens):
        for handle, token in zip(handles, tokens):
            self.sequences[handle].append(token)
        return torch.stack([self._logits(self.sequences[handle]) for handle in handles])

    def fork(self, handle):
        return self._new(list(self.sequences[handle]))

    def free(self, handle):
        del self.sequences[handle]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab_size=61, max_seq_len=64)


def plain(model, prompts, eos_ids=(5,), max_seq_len=64, **params):
    space = PlainSpace(model)
    beams = beam_search(space, prompts, BeamParams(**params), eos_ids, max_seq_len=max_seq_len)
    assert not space.sequences, "every sequence is freed"
    return beams


def slow_twin(model, prompt, *, num_beams, num_groups, penalty, max_tokens, eos):
    """Groups by the definition, with sums over whole lists; completions end only at `eos` or the limit and nothing stops early."""
    width = num_beams // num_groups
    groups, finished = [[([], 0.0)] for _ in range(num_groups)], [[] for _ in range(num_groups)]
    for place in range(max_tokens):
        taken = Counter()
        for number, beams in enumerate(groups):
            options = []
            for tokens, total in beams:
                with torch.no_grad():
                    hidden = model(torch.tensor([prompt + tokens]))
                logprobs = model.logits(hidden)[0, -1].double().log_softmax(-1).tolist()
                options += [
                    (total + logprob - penalty * taken[token], total + logprob, [*tokens, token]) for token, logprob in enumerate(logprobs)
                ]
            options.sort(key=lambda option: -option[0])
            last = place == max_tokens - 1
            for _, total, tokens in options[:width]:
                if last or tokens[-1] == eos:
                    finished[number].append((total / len(tokens), tokens))
            groups[number] = [(tokens, total) for _, total, tokens in options if tokens[-1] != eos][:width]
            taken.update(tokens[-1] for tokens, _ in groups[number])
    best = [pair for found in finished for pair in sorted(found, reverse=True)[:width]]
    return [[token for token in tokens if token != eos] for _, tokens in sorted(best, reverse=True)]


@pytest.mark.oracle
@pytest.mark.parametrize("num_beams, length_penalty, early_stopping", GRID)
def test_transformers_finds_the_same_beams(model, make_prompts, tmp_path_factory, num_beams, length_penalty, early_stopping):
    theirs, prompt = _transformers_model(model, tmp_path_factory), make_prompts([9], 61)[0]
    options = dict(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
            num_return_sequences=num_beams,
            eos_token_id=[5, 9],
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    expected = [_until_end(row[len(prompt) :].tolist(), (5, 9)) for row in out.sequences]
    ours = plain(model, [prompt], (5, 9), max_tokens=10, num_return=num_beams, **options)[0]
    assert [beam.tokens for beam in ours] == expected
    if num_beams > 1:
        torch.testing.assert_close(torch.tensor([beam.score for beam in ours]), out.sequences_scores, atol=2e-5, rtol=1e-5)


def _transformers_model(model, tmp_path_factory, cache={}):  # noqa: B006
    transformers = pytest.importorskip("transformers")
    if id(model) not in cache:
        folder = tmp_path_factory.mktemp("export")
        save_model(model, None, folder)
        cache[id(model)] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return cache[id(model)]


def _until_end(tokens: list[int], ends) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def test_the_engine_finds_what_whole_runs_find(model, make_prompts):
    """Over the cache, all prompts at once, beside a running request, and nothing is left behind."""
    prompts = make_prompts([3, 40, 33], 61)
    engine = Engine(model, max_batch=24, max_seq_len=64, eos_ids=(5,))
    beside = engine.add(make_prompts([9], 61)[0])
    engine.step()
    for params in (BeamParams(max_tokens=20, num_return=4), BeamParams(num_beams=6, num_groups=3, diversity_penalty=0.7, max_tokens=9)):
        with engine.search() as space:
            found = beam_search(space, prompts, params, engine.eos_ids, max_seq_len=64)
        expected = beam_search(PlainSpace(model), prompts, params, engine.eos_ids, max_seq_len=64)
        for ours, theirs in zip(found, expected):
            assert [(beam.tokens, beam.finish_reason) for beam in ours] == [(beam.tokens, beam.finish_reason) for beam in theirs]
            for one, other in zip(ours, theirs):
                assert abs(one.score - other.score) < 1e-4
    engine.cancel(beside)
    engine.check_integrity()


def test_one_beam_is_greedy(model, make_prompts):
    prompt = make_prompts([5], 61)[0]
    beam = plain(model, [prompt], num_beams=1, max_tokens=10)[0][0]
    space = PlainSpace(model)
    _, logits = space.start(prompt)
    for token in beam.tokens:
        assert token == logits.argmax()
        logits = space.extend([1], [token])[0]


def test_a_wide_search_finds_the_best_of_all(make_model):
    """With as many beams as there are pairs of tokens, the result is the best of all completions of three tokens."""
    model = make_model(vocab_size=5, max_seq_len=16)
    best = beam_search(PlainSpace(model), [[1, 2]], BeamParams(num_beams=25, max_tokens=3, length_penalty=0.0))[0][0]
    totals = {}
    for tokens in itertools.product(range(5), repeat=3):
        with torch.no_grad():
            logprobs = model.logits(model(torch.tensor([[1, 2, *tokens]])))[0].double().log_softmax(-1)
        totals[tokens] = sum(logprobs[1 + i, token].item() for i, token in enumerate(tokens))
    assert tuple(best.tokens) == max(totals, key=totals.get)
    assert abs(best.logprob - max(totals.values())) < 1e-4


@pytest.mark.parametrize("num_beams, num_groups, penalty", [(4, 2, 0.8), (6, 3, 0.5), (3, 3, 10.0)])
def test_groups_are_the_slow_twins(model, make_prompts, num_beams, num_groups, penalty):
    prompt = make_prompts([4], 61)[0]
    # Without a stop before the limit: 'never' with a high power of the length looks at the longest completion.
    found = plain(
        model, [prompt], num_beams=num_beams, num_groups=num_groups, diversity_penalty=penalty, max_tokens=5, num_return=num_beams,
        early_stopping="never",
    )[0]  # fmt: skip
    expected = slow_twin(model, prompt, num_beams=num_beams, num_groups=num_groups, penalty=penalty, max_tokens=5, eos=5)
    assert [beam.tokens for beam in found] == expected[:num_beams]


def test_groups_differ_where_the_penalty_is_high(model, make_prompts):
    found = plain(model, make_prompts([4], 61), num_beams=4, num_groups=4, diversity_penalty=50.0, max_tokens=6, num_return=4)[0]
    for place in range(6):
        taken = [beam.tokens[place] for beam in found if len(beam.tokens) > place]
        assert len(set(taken)) == len(taken)


def test_the_context_bounds_a_search(model):
    beams = plain(model, [[1] * 60], eos_ids=(), max_tokens=50, num_return=2)[0]
    assert all(len(beam.tokens) == 4 and beam.finish_reason == "length" for beam in beams)
    with pytest.raises(UserError, match="64 tokens leaves no room"):
        plain(model, [[1] * 64])


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 6, "num_groups": 4}, "not a multiple of num_groups=4"),
        ({"num_return": 5}, "num_return=5 is more than num_beams=4"),
        ({"early_stopping": "sometimes"}, "early_stopping='sometimes'"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"num_groups": 2, "diversity_penalty": -1.0}, "diversity_penalty=-1.0"),
        ({"diversity_penalty": 1.0}, "does nothing in one group"),
    ],
)
def test_wrong_parameters_are_named(fields, says):
    with pytest.raises(UserError, match=says):
        BeamParams(**fields)
