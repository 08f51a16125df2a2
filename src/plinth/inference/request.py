"""A request to the engine, and what comes back for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from plinth.config import UserError
from plinth.inference.blocks import CachedSequence
from plinth.inference.constraint import Constraint
from plinth.inference.drafting import Drafter
from plinth.inference.penalties import TokenCounts
from plinth.inference.sampling_params import SamplingParams

TopLogprobs = list[tuple[int, float]]


@dataclass
class Counters:
    """What an engine has done since it was made."""

    steps: int = 0
    """calls of the model for requests"""
    prompt_tokens: int = 0
    """prompt tokens of requests whose prompts were read to the end"""
    cached_tokens: int = 0
    """those of them that were known already"""
    completion_tokens: int = 0
    """tokens given, those that ended a completion too"""
    forced_tokens: int = 0
    """tokens that a constraint left no choice about"""
    drafted: int = 0
    """tokens guessed by drafters"""
    accepted: int = 0
    """guesses that were right"""
    known_answers: int = 0
    """requests answered from the cache of answers"""


@dataclass(slots=True)
class Event:
    """One token of one request."""

    id: int
    """the request, as `add` returned it"""
    token: int
    """token id; with finish_reason 'stop' it is the token that ended the completion and is no part of it (-1 where nothing was allowed)"""
    logprob: float
    """log-probability in nats of the token under the raw model distribution; 0 at the end that a finished constraint makes"""
    top_logprobs: TopLogprobs
    """(token id, log-probability in nats) of the most probable tokens, most probable first"""
    finish_reason: str | None
    """'stop', 'length', or None while the request goes on"""
    prompt_logprobs: list[tuple[float, TopLogprobs]] | None = None
    """on a request's first event, where asked for: what `score_alternatives` gives for its prompt"""


@dataclass(frozen=True)
class Completion:
    """What the model wrote for one prompt."""

    tokens: list[int]
    """token ids without the one that ended it"""
    logprobs: list[float]
    """log-probability in nats of each token, raw model distribution"""
    top_logprobs: list[TopLogprobs]
    """the most probable tokens at each place, as many as were asked for"""
    finish_reason: str
    """'stop' (an end token, or a constraint that lets nothing follow) or 'length' (max_tokens, or the end of the context)"""
    prompt_tokens: int
    """length of the prompt in tokens"""
    prompt_logprobs: list[tuple[float, TopLogprobs]] | None = None
    """for each prompt token but the first its log-probability and the alternatives, where asked for"""


@dataclass(eq=False, slots=True)
class Request:
    """A request between `add` and its end."""

    id: int
    prompt: np.ndarray
    """int32"""
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    slot: int = -1
    sequence: CachedSequence | None = None
    tokens: list[int] = field(default_factory=list)
    """prompt and completion so far"""
    first_block: bytes = b""
    """the prompt's first tokens, to tell quickly whether two prompts can share anything"""
    num_cached: int = 0
    """tokens of the prompt that were known when it started"""
    history: TokenCounts | None = None
    """for penalties; None where there are none"""
    prompt_logprobs: list[tuple[float, TopLogprobs]] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def capacity_tokens(self) -> int:
        """Positions that may be written; the last token of all is never read again."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None


@dataclass
class Collected:
    """The events of one request, gathered."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    prompt_logprobs: list[tuple[float, TopLogprobs]] | None = None

    def push(self, event: Event) -> None:
        """Take the next event."""
        if event.finish_reason != "stop":
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
            self.top_logprobs.append(event.top_logprobs)
        self.finish_reason = event.finish_reason or ""
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs

    def completion(self, prompt_tokens: int) -> Completion:
        """Return all of it, once the request has ended."""
        return Completion(self.tokens, self.logprobs, self.top_logprobs, self.finish_reason, prompt_tokens, self.prompt_logprobs)


def each_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Return one SamplingParams a prompt. With one seed for several prompts, prompt i gets seed + i."""
    if params is None or isinstance(params, SamplingParams):
        shared = params or SamplingParams()
        if shared.seed is None:
            return [shared] * count
        return [replace(shared, seed=shared.seed + i) for i in range(count)]
    if len(params) != count:
        raise UserError(f"params has {len(params)} entries for {count} prompts. Give one for all, or one for each.")
    return list(params)
