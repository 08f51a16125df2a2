"""What a client gets back: completions, chats and their chunks, with log-probabilities, in OpenAI's wire format.

Sources: the OpenAPI description of OpenAI's API, and the types of the `openai` Python client.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plinth.serving.grammars import Structure
from plinth.serving.pieces import CharacterCount, Piece, Token
from plinth.serving.ticket import Ticket
from plinth.tokenizer.encode import Tokenizer

MAX_WARNING = 1000  # characters
LOWEST_LOGPROB = -9999.0  # what the wire has for minus infinity, which JSON cannot spell


@dataclass(frozen=True)
class Envelope:
    """The fields that an answer and all chunks of a stream share."""

    kind: str
    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def completion(cls, model: str) -> Envelope:
        return cls("text_completion", model, f"cmpl-{secrets.token_hex(12)}")

    @classmethod
    def chat(cls, model: str, stream: bool) -> Envelope:
        return cls("chat.completion.chunk" if stream else "chat.completion", model, f"chatcmpl-{secrets.token_hex(12)}")

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return an answer, or one chunk, that holds `choices`."""
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices, **more}


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a name of a token that no other token shares: its text, or `bytes:\\xe2\\x82` where it is part of a character."""
    data = tokenizer.token_bytes(token_id, skip_special=False)
    try:
        return data.decode("utf-8") if data else f"token_id:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> list[int] | None:
    """Return the bytes a token adds to the text; None for a special token, which adds none."""
    return list(tokenizer.token_bytes(token_id)) or None


class ChatLogprobs:
    """Makes the `logprobs` object of a chat's choice."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return {content: [{token, logprob, bytes, top_logprobs}]} for the next tokens."""
        content = [
            {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(*other) for other in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        name = token_name(self.tokenizer, token_id)
        return {"token": name, "logprob": finite(logprob), "bytes": token_bytes(self.tokenizer, token_id)}


class CompletionLogprobs:
    """Makes the `logprobs` object of a completion's choice; keeps the offset in characters from piece to piece.

    A token that starts inside a character has that character's offset.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.characters = CharacterCount()

    def __call__(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return {tokens, token_logprobs, top_logprobs, text_offset} for the next tokens.

        The chosen token is among its alternatives, with the same number, even where it is not one of the most probable.
        A token without a log-probability (the first of an echoed prompt) has null for it.
        """
        names = [token_name(self.tokenizer, token.id) for token in tokens]
        logprobs, alternatives, offsets = [], [], []
        for name, token in zip(names, tokens):
            offsets.append(self.characters.advance(self.tokenizer.token_bytes(token.id))[0])
            if token.logprob is None:
                logprobs.append(None)
                alternatives.append(None)
                continue
            logprobs.append(finite(token.logprob))
            best = {token_name(self.tokenizer, other): finite(value) for other, value in token.top_logprobs}
            alternatives.append(best | {name: finite(token.logprob)})
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": alternatives, "text_offset": offsets}


@dataclass
class Choice:
    """One sequence of an answer, as its pieces come."""

    text: str = ""
    """all of its text, the echo too"""
    written: str = ""
    """what the model wrote"""
    tokens: list[Token] = field(default_factory=list)
    """its tokens, those of the echo too"""
    finish_reason: str | None = None
    """why it ended"""
    logprob_sum: float = 0.0
    """log-probability in nats of the tokens that the model wrote"""
    num_scored: int = 0
    """how many tokens that sums"""

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or self.finish_reason
        if piece.num_generated:
            self.written += piece.text
            self.logprob_sum += sum(token.logprob or 0.0 for token in piece.tokens)
            self.num_scored += len(piece.tokens)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of a token that the model wrote, in nats; an empty text has minus infinity."""
        return self.logprob_sum / self.num_scored if self.num_scored else -math.inf


async def gather(ticket: Ticket) -> list[Choice]:
    """Await all sequences of a ticket. When this is cancelled, so is the ticket."""
    choices = [Choice() for _ in range(ticket.size)]
    try:
        async for index, piece in ticket.pieces():
            choices[index].add(piece)
    finally:
        ticket.cancel()
    return choices


def headers_of(structure: Structure | None) -> dict[str, str]:
    """Return the headers of an answer: what of its form is not enforced."""
    if structure is None or not structure.warnings:
        return {}
    return {"X-Plinth-Warning": "; ".join(structure.warnings)[:MAX_WARNING].encode("ascii", "replace").decode().replace("\n", " ")}
