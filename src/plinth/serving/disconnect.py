"""Clients that go away before their answer is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from fastapi import Request
from fastapi.responses import Response

CLIENT_LEFT = 499  # a status that nobody reads: the client is gone


async def until_disconnect(request: Request, answer: Awaitable[Response]) -> Response:
    """Await `answer`, and cancel it when the client goes away first. The body must have been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=CLIENT_LEFT)
    finally:
        answering.cancel()
        leaving.cancel()
