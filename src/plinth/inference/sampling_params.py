"""What a request may say about the choice of its tokens, checked when it is said."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from plinth.config import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens for one request, and when to stop."""

    temperature: float = 1.0
    """divisor of the logits; 0 = always the most probable token (the lower id on a tie)"""
    top_k: int | None = None
    """keep only this many most probable tokens; None = all"""
    top_p: float | None = None
    """keep the fewest tokens whose probability together reaches this share, in (0, 1]; None = all"""
    min_p: float | None = None
    """keep tokens at least this many times as probable as the most probable one, in [0, 1]; None = all"""
    typical_p: float | None = None
    """keep the tokens whose surprise is nearest to the expected one until they reach this share, in (0, 1]; None = all"""
    repetition_penalty: float | None = None
    """divisor of positive and factor of negative logits of tokens in the prompt or the completion, above 0; None = 1"""
    presence_penalty: float | None = None
    """taken off the logit of every token that is in the completion, in [-2, 2]; None = 0"""
    frequency_penalty: float | None = None
    """taken off a token's logit once for each time it is in the completion, in [-2, 2]; None = 0"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit)"""
    allowed_token_ids: tuple[int, ...] | None = None
    """the only token ids that may be chosen, ends of the completion too; None = all"""
    max_tokens: int = 128
    """completion tokens at most; the context of the model bounds it too"""
    min_tokens: int = 0
    """completion tokens before one that ends it may be chosen"""
    stop: tuple[str, ...] = ()
    """strings that end the text; they are not part of it"""
    stop_token_ids: tuple[int, ...] = ()
    """token ids that end the completion, beside the model's own end; they are not part of it"""
    ignore_eos: bool = False
    """whether the completion goes on behind the model's own end tokens; those of stop_token_ids end it nevertheless"""
    seed: int | None = None
    """seed of this request alone; None = a fresh one from the operating system"""
    logprobs: int | None = None
    """alternatives to report a token, most probable first, raw model distribution; None or 0 = only the chosen token's"""
    prompt_logprobs: int | None = None
    """alternatives to report for each token of the prompt; 0 = only the token's own; None = do not score the prompt"""

    def __post_init__(self) -> None:
        self._check_shape()
        self._check_penalties()
        _check_count("max_tokens", self.max_tokens, 1, "it bounds the completion's length")
        _check_count("min_tokens", self.min_tokens, 0, "it is a length in tokens")
        if self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}. Lower the first or raise the second.")
        _check_count("logprobs", self.logprobs, 0, "it is the number of alternatives a token")
        _check_count("prompt_logprobs", self.prompt_logprobs, 0, "it is the number of alternatives a token of the prompt")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise UserError(f"seed={self.seed!r} is not a whole number.")
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos={self.ignore_eos!r} is neither true nor false.")
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))

    def _check_shape(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or more")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _check_number(name, value, 0.0, 1.0, "more than 0 and at most 1; leave it out to keep all tokens")
            if value == 0:
                raise UserError(f"{name}=0 keeps no token. It must be more than 0 and at most 1; for greedy choice use temperature=0.")
        _check_number("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        _check_count("top_k", self.top_k, 1, "leave it out to keep all tokens")

    def _check_penalties(self) -> None:
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "more than 0; 1 changes nothing")
        if self.repetition_penalty == 0:
            raise UserError("repetition_penalty=0 would divide by it. It must be more than 0; 1 changes nothing.")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2.0, 2.0, "between -2 and 2")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise UserError("allowed_token_ids is empty: no token could be chosen. Name at least one, or leave it out.")
            object.__setattr__(self, "allowed_token_ids", allowed)

    @cached_property
    def needs_history(self) -> bool:
        """Whether the choice depends on how often each token has come: a TokenCounts is to be kept then."""
        return bool((self.repetition_penalty or 1.0) != 1.0 or self.presence_penalty or self.frequency_penalty)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether logits are changed before the temperature divides them."""
        return bool(self.needs_history or self.logit_bias or self.allowed_token_ids is not None or self.min_tokens)

    @cached_property
    def ranks_tokens(self) -> bool:
        """Whether tokens are dropped before the draw, by rank or probability."""
        return bool(self.top_k or (self.top_p or 1.0) < 1.0 or self.min_p or (self.typical_p or 1.0) < 1.0)

    def end_ids(self, eos_ids: Collection[int]) -> frozenset[int]:
        """Return the token ids that end the completion, given those of the model."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_ids))

    def check_ids(self, vocab_size: int) -> None:
        """Raise UserError when a token id named here lies outside the vocabulary."""
        named = {
            "logit_bias": [token for token, _ in self.logit_bias],
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in named.items():
            wrong = [token for token in ids if not 0 <= token < vocab_size]
            if wrong:
                raise UserError(f"{name} names token id {wrong[0]}; the vocabulary has ids 0 to {vocab_size - 1}.")


def _check_number(name: str, value: float | None, low: float, high: float, rule: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (low <= value <= high) or math.isinf(value):
        raise UserError(f"{name}={value!r} is out of range: it must be {rule}.")


def _check_count(name: str, value: int | None, low: int, rule: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise UserError(f"{name}={value!r} is not a whole number of at least {low}: {rule}.")


def _ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    for token in ids:
        _check_count(name, token, 0, "it holds token ids")
    return tuple(ids)


def _biases(biases: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    pairs = tuple((token, bias) for token, bias in (biases.items() if isinstance(biases, Mapping) else biases))
    for token, bias in pairs:
        _check_count("logit_bias", token, 0, "it maps token ids to numbers")
        _check_number(f"logit_bias[{token}]", bias, -math.inf, math.inf, "a finite number")
    if len({token for token, _ in pairs}) < len(pairs):
        raise UserError("logit_bias names a token id twice. Give one number for each id.")
    return tuple((token, float(bias)) for token, bias in pairs)


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stop):
        raise UserError(f"stop={list(stop)!r} holds an empty string or no string: it would end every text at once. Remove it.")
    return stop
