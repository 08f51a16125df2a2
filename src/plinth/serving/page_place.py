"""A place in an answer, as the page names it: a conversation or a text, and the tokens of the answer so far."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from plinth.inference.blocks import OutOfBlocks
from plinth.serving.answer import finite, token_bytes, token_name
from plinth.serving.batcher import RETRY_AFTER_S
from plinth.serving.errors import ApiError, bad_request
from plinth.serving.messages import Message, plain_messages
from plinth.serving.server import Server
from plinth.tokenizer.encode import Tokenizer


class Place(BaseModel):
    """Where the page wants something to go on."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    tokens: list[int] = []
    """ids of the answer so far"""


async def place_tokens(server: Server, messages: list[Message] | None, prompt: str | None, answer: list[int]) -> list[int]:
    """Return the tokens up to a place. Raises ApiError where it names none."""
    if (messages is None) == (prompt is None):
        raise bad_request("Give one of messages and prompt.", param="messages")
    if any(not 0 <= token < server.vocab_size for token in answer):
        raise bad_request(f"tokens holds an id outside 0 to {server.vocab_size - 1}.", param="tokens")
    if messages is not None:
        return [*await server.render(plain_messages(messages)), *answer]
    (before,) = await server.encode([prompt or ""], "prompt")
    return [*before, *answer]


def describe(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    """Return a token for the page: its id, its bytes (null for a special token), its name, its log-probability in nats."""
    return {
        "id": token_id,
        "bytes": token_bytes(tokenizer, token_id),
        "name": token_name(tokenizer, token_id),
        "logprob": finite(logprob),
    }


def cache_full(error: OutOfBlocks) -> ApiError:
    """Return the 503 for something that found no room beside running requests."""
    return ApiError(503, f"The cache is full: {error} Try again soon.", code="cache_full", retry_after_s=RETRY_AFTER_S)
