"""Server-sent events: the chunks of a streamed answer, one `data:` line each, then [DONE]."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from plinth.serving.answer import ChatLogprobs, CompletionLogprobs, Envelope
from plinth.serving.errors import ApiError, internal_error
from plinth.serving.ticket import Ticket
from plinth.tokenizer.encode import Tokenizer

LOG = logging.getLogger("plinth.serving")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def encode_event(value: dict[str, Any] | str) -> bytes:
    """Return one event on the wire."""
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"data: {data}\n\n".encode()


class Cancellable(Protocol):
    """What makes the chunks of a stream: a ticket, or a search."""

    def cancel(self) -> None:
        """Give up what has not ended."""


class EventStream(StreamingResponse):
    """Sends chunks as they come. A client that goes away cancels what makes them; a failure becomes an error event."""

    def __init__(self, source: Cancellable, chunks: AsyncIterator[dict[str, Any]]):
        super().__init__(encode_chunks(chunks), media_type="text/event-stream", headers=HEADERS)
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.source.cancel()


async def encode_chunks(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield the bytes of each chunk, and how the stream ended."""
    try:
        async for chunk in chunks:
            yield encode_event(chunk)
        yield encode_event("[DONE]")
    except ApiError as error:
        yield encode_event(error.body())
    except Exception:
        LOG.exception("a stream failed")
        yield encode_event(internal_error().body())


async def completion_chunks(
    ticket: Ticket, envelope: Envelope, tokenizer: Tokenizer, with_logprobs: bool, with_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of /v1/completions."""
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    logprobs = [CompletionLogprobs(tokenizer) for _ in range(ticket.size)]
    async for index, piece in ticket.pieces():
        if not (piece.text or piece.finish_reason or (with_logprobs and piece.tokens)):
            continue
        entry = logprobs[index](piece.tokens) if with_logprobs else None
        choice = {"index": index, "text": piece.text, "logprobs": entry, "finish_reason": piece.finish_reason}
        yield envelope.wrap([choice], **more)
    if with_usage:
        yield envelope.wrap([], usage=ticket.record.usage())


async def chat_chunks(
    ticket: Ticket, envelope: Envelope, tokenizer: Tokenizer, with_logprobs: bool, with_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of /v1/chat/completions: the role, then text, then the reason of the end."""
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    logprobs = ChatLogprobs(tokenizer)

    def chunk(index: int, delta: dict[str, Any], entry: Any = None, reason: str | None = None) -> dict[str, Any]:
        return envelope.wrap([{"index": index, "delta": delta, "logprobs": entry, "finish_reason": reason}], **more)

    for index in range(ticket.size):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, piece in ticket.pieces():
        if piece.text or (with_logprobs and piece.tokens):
            yield chunk(index, {"content": piece.text}, logprobs(piece.tokens) if with_logprobs else None)
        if piece.finish_reason:
            yield chunk(index, {}, reason=piece.finish_reason)
    if with_usage:
        yield envelope.wrap([], usage=ticket.record.usage())
