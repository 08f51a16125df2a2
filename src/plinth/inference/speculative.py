"""Guessing the next tokens of a request, so that one call of the model gives several: from its own text, or by a smaller model.

The engine draws every place as it would without a guess and keeps a guess as long as it equals what was drawn, so nothing here
can change an answer (plinth.inference.drafting). A guess that is certain is kept with the probability that the model gives it,
as under the rejection rule of Leviathan et al. 2023, arXiv:2211.17192, and Chen et al. 2023, arXiv:2302.01318. A draft model draws
with the very noise that the model will draw with, so that the two agree wherever their distributions do.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from plinth.config import UserError
from plinth.inference.blocks import OutOfBlocks
from plinth.inference.drafting import Drafter
from plinth.inference.engine import Engine
from plinth.inference.sampling import choose_tokens
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.search import SequenceSpace

PROMPT_LOOKUP = "prompt-lookup"  # name of the method that needs no second model
LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens in a row that must have stood in the text before
REMEASURE_STEPS = 32  # plain steps are timed again after so many steps that guessed
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # steps without a guess after guessing has not paid
FEW_TOKENS = 3  # missed tokens that a draft model reads one by one; more are read as a prompt, with what it knows of it
MEMORY = 0.8  # weight of what was measured before, at each new measurement


class PromptLookup:
    """Guesses that the text goes on as it did the last time that its last few tokens stood there; costs next to nothing.

    Source: Saxena 2023, "Prompt lookup decoding". Ours tries the longest match first and remembers where each run of tokens stood.
    """

    def __init__(self, num_tokens: int = 8):
        self._num_tokens = num_tokens
        self._followed_by: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return what followed the last tokens the last time, [] where they are new."""
        for place in range(self._indexed, len(tokens)):
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, place) + 1):
                self._followed_by[tuple(tokens[place - length : place])] = place
        self._indexed = len(tokens)
        for length in range(min(LONGEST_MATCH, len(tokens)), SHORTEST_MATCH - 1, -1):
            place = self._followed_by.get(tuple(tokens[-length:]))
            if place is not None:
                return list(tokens[place : place + min(count, self._num_tokens)])
        return []

    def observe(self, proposed: int, accepted: int) -> None:
        """Nothing is learnt from it."""


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, which reads along over a cache of its own.

    space: sequences of the smaller model, shared by all requests. seed: the request's own. prompt_tokens: length of its prompt.
    """

    def __init__(self, space: SequenceSpace, max_seq_len: int, params: SamplingParams, seed: int, prompt_tokens: int, num_tokens: int = 4):
        self._space, self._max_seq_len, self._num_tokens = space, max_seq_len, num_tokens
        plain = replace(params, repetition_penalty=None, presence_penalty=None, frequency_penalty=None, min_tokens=0, logprobs=None)
        self._params, self._seed, self._prompt_tokens = plain, seed % 2**64, prompt_tokens
        self._states: list[_State] = []  # after ever more tokens; those behind a refused guess are dropped at the next call
        weakref.finalize(self, _free_all, space, self._states)

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the smaller model's own draws; [] where its context or its cache is full."""
        count = min(count, self._num_tokens, self._max_seq_len - len(tokens))
        if count < 1:
            return []
        try:
            state = self._catch_up(tokens)
            guess: list[int] = []
            while True:
                index = len(tokens) - self._prompt_tokens + len(guess)
                guess += choose_tokens(state.logits_V[None], [self._params], [self._seed], [index]).tokens
                if len(guess) == count or guess[-1] < 0:
                    return [token for token in guess if token >= 0]
                state = self._extended(state, guess[-1])
        except OutOfBlocks:
            _free_all(self._space, self._states)
            return []

    def observe(self, proposed: int, accepted: int) -> None:
        """The next call finds out by itself."""

    def _catch_up(self, tokens: Sequence[int]) -> _State:
        while self._states and self._states[-1].tokens != list(tokens[: len(self._states[-1].tokens)]):
            self._space.free(self._states.pop().handle)
        while len(self._states) > 1:  # earlier states than the last that holds are not needed any more
            self._space.free(self._states.pop(0).handle)
        if self._states and len(tokens) - len(self._states[-1].tokens) > FEW_TOKENS:
            _free_all(self._space, self._states)
        if not self._states:
            handle, logits_V = self._space.start(tokens)
            self._states.append(_State(handle, list(tokens), logits_V))
        state = self._states[-1]
        for token in tokens[len(state.tokens) :]:
            state = self._extended(state, token)
        return state

    def _extended(self, state: _State, token: int) -> _State:
        handle = self._space.fork(state.handle)
        try:
            logits_V = self._space.extend([handle], [token])[0].clone()
        except OutOfBlocks:
            self._space.free(handle)
            raise
        self._states.append(_State(handle, [*state.tokens, token], logits_V))
        return self._states[-1]


@dataclass(eq=False)
class _State:
    handle: int
    tokens: list[int]
    logits_V: torch.Tensor


def _free_all(space: SequenceSpace, states: list[_State]) -> None:
    while states:
        space.free(states.pop().handle)


class WhileItPays:
    """Lets a drafter guess only while its steps give tokens faster than plain ones; an answer never depends on it.

    Times are those between calls, so they hold whatever else the engine does in a step. After guessing has not paid it pauses,
    longer each time.
    """

    def __init__(self, drafter: Drafter, clock: Callable[[], float] = time.perf_counter):
        self._drafter, self._clock = drafter, clock
        self._plain_s: float | None = None
        self._guessed_s: float | None = None
        self._tokens = 1.0
        self._began: float | None = None
        self._guessed = False
        self._accepted = 0
        self._to_plain, self._paused, self._pause = 0, 1, FIRST_PAUSE
        self._reads_up = True  # the first guess, and that after a pause, has text to read: its time says nothing

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the drafter's guess, or [] while it pauses."""
        now = self._clock()
        if self._began is not None:
            self._learn(now - self._began)
        self._began, self._guessed, self._accepted = now, False, 0
        if self._paused or not self._to_plain:
            self._paused, self._to_plain = max(0, self._paused - 1), REMEASURE_STEPS
            return []
        guess = self._drafter.propose(tokens, count)
        if guess:
            self._guessed = True
            self._to_plain -= 1
        return guess

    def observe(self, proposed: int, accepted: int) -> None:
        """Hear how many of the guesses were right."""
        self._accepted = accepted
        self._drafter.observe(proposed, accepted)

    def _learn(self, elapsed_s: float) -> None:
        if not self._guessed:
            self._plain_s = _mixed(self._plain_s, elapsed_s)
            return
        if self._reads_up:
            self._reads_up = False
            return
        self._guessed_s = _mixed(self._guessed_s, elapsed_s)
        self._tokens = MEMORY * self._tokens + (1 - MEMORY) * (1 + self._accepted)
        if self._plain_s is not None and self._tokens * self._plain_s < self._guessed_s:
            self._paused, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self._reads_up = True
            self._guessed_s, self._tokens = None, self._guessed_s / self._plain_s  # on probation: as if it just paid


def _mixed(before: float | None, now: float) -> float:
    return now if before is None else MEMORY * before + (1 - MEMORY) * now


@dataclass(frozen=True)
class Speculation:
    """How requests of an engine are guessed for."""

    draft: Engine | None = None
    """engine of the smaller model, with room for a sequence and num_tokens + 1 blocks a request; None = from the request's own text"""
    num_tokens: int | None = None
    """tokens guessed at a time; None = 8 from the text, 4 by a model"""
    only_while_it_pays: bool = True
    """whether guessing pauses where it does not make a request faster"""

    def __post_init__(self) -> None:
        if self.num_tokens is not None and not 1 <= self.num_tokens <= 15:
            raise UserError(f"draft_tokens={self.num_tokens} is not between 1 and 15, what one call of the model checks.")

    def check(self, engine: Engine) -> None:
        """Raise UserError when the smaller model cannot guess for this engine's."""
        if self.draft is not None and self.draft.vocab_size != engine.vocab_size:
            raise UserError(
                f"the draft model has {self.draft.vocab_size} token ids, the model {engine.vocab_size}. "
                "It must be trained with the same tokenizer."
            )

    def drafter(self, params: SamplingParams, seed: int, prompt_tokens: int) -> Drafter:
        """Return a drafter for one request; seed is that which the request is drawn with."""
        drafter: Drafter = PromptLookup(self.num_tokens or 8)
        if self.draft is not None:
            space = self.draft.search()
            drafter = DraftModel(space, self.draft.max_seq_len, params, seed, prompt_tokens, self.num_tokens or 4)
        return WhileItPays(drafter) if self.only_while_it_pays else drafter
