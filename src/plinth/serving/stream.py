"""Server-sent events: the chunks of a streamed answer, one `data:` line each, then [DONE]."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from plinth.serving.errors import ApiError, internal_error

LOG = logging.getLogger("plinth.serving")
DESCRIBED: dict[int | str, dict[str, Any]] = {200: {"description": "The answer, or its stream.", "content": {"text/event-stream": {}}}}
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

    def __init__(self, source: Cancellable, chunks: AsyncIterator[dict[str, Any]], headers: dict[str, str] | None = None):
        super().__init__(encode_chunks(chunks), media_type="text/event-stream", headers=HEADERS | (headers or {}))
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
