"""From the engine's tokens to pieces of an answer: certain text, and the tokens that it is made of."""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass

from plinth.inference.engine import Event
from plinth.inference.text import TextAssembler
from plinth.tokenizer.encode import Tokenizer


@dataclass(frozen=True)
class Token:
    """One token of an answer; log-probabilities in nats, of the model's own distribution."""

    id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts"""
    top_logprobs: list[tuple[int, float]]
    """(token id, log-probability) of the most probable tokens, most probable first"""


@dataclass(frozen=True)
class Piece:
    """What one engine step adds to one sequence."""

    text: str
    """text that is certain: whole characters, and no part of a stop string"""
    tokens: tuple[Token, ...]
    """the tokens that this text ends; a token whose text is held back waits with it"""
    num_generated: int
    """tokens that the engine made since the last piece, those without text too"""
    finish_reason: str | None
    """'stop' or 'length' on the last piece of a sequence, else None"""


class CharacterCount:
    """Counts the characters of a text whose bytes come token by token."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.count = 0

    def advance(self, data: bytes) -> tuple[int, int]:
        """Take a token's bytes; return the index of the character it begins in, and the count of those complete after it.

        Bytes that never become a character count as one U+FFFD for each maximal part, as Python decodes them.
        """
        start = self.count
        if data and self._is_inside:
            first = self._decoder.decode(data[:1])
            self.count += len(first)
            if len(first) == 2 or (first and self._is_inside):  # the unfinished character was broken off before this token
                start += 1
            data = data[1:]
        self.count += len(self._decoder.decode(data))
        return start, self.count

    @property
    def _is_inside(self) -> bool:
        return bool(self._decoder.getstate()[0])


class Assembly:
    """The text of one sequence as it grows, with its tokens in step.

    A token belongs to the answer when its text begins before the answer's end: tokens that lie wholly inside a stop
    string are left out, like the token that ended the sequence.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._assembler = TextAssembler(tokenizer, stop)
        self._characters = CharacterCount()
        self._num_sent = 0  # characters
        self._held: deque[tuple[int, int, Token]] = deque()  # (first character, character after the last, token)

    def push(self, event: Event) -> Piece:
        """Return what this event adds."""
        text = "" if event.token is None or event.finish_reason == "stop" else self._add(event)
        reason = event.finish_reason
        if reason is not None:
            text += self._assembler.flush()
        if self._assembler.stopped:
            reason = "stop"
        self._num_sent += len(text)
        return Piece(text, self._release(final=reason is not None), 0 if event.token is None else 1, reason)

    def _add(self, event: Event) -> str:
        start, end = self._characters.advance(self._tokenizer.token_bytes(event.token))
        self._held.append((start, end, Token(event.token, event.logprob, event.top_logprobs)))
        return self._assembler.push(event.token)

    def _release(self, final: bool) -> tuple[Token, ...]:
        released = []
        while self._held:
            start, end, token = self._held[0]
            if not (end <= self._num_sent or (final and start < self._num_sent)):
                break
            released.append(self._held.popleft()[2])
        return tuple(released)
