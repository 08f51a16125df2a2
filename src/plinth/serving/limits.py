"""What a server refuses before it reads a request: foreign origins and hosts, missing keys, bodies too large or too slow."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plinth.config import UserError
from plinth.serving.errors import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Limits:
    """How much a server takes on."""

    max_queue: int = 64
    """sequences that may wait for a place in the batch; further requests get 429"""
    max_body_bytes: int = 8 * 2**20
    """size of a request's body; larger ones get 413"""
    body_timeout_s: float = 30.0
    """seconds from a request's headers to the end of its body; slower ones get 408"""
    request_timeout_s: float = 600.0
    """seconds that an answer may take; longer ones get 504, and what was streamed until then stays"""
    max_buffered_pieces: int = 4096
    """pieces of text kept for a client that does not read; then its request is given up"""
    context_policy: Literal["refuse", "drop-oldest"] = "refuse"
    """conversations that no longer fit the context: refuse, or drop the oldest exchanges and say so in the answer"""

    def check(self) -> None:
        """Raise UserError for a number that is out of range."""
        for name in ("max_queue", "max_body_bytes", "max_buffered_pieces"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("body_timeout_s", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be more than 0 seconds.")


class SameOrigin:
    """Answer only pages of this server itself, and, on a loopback address, only loopback host names.

    A browser sends Origin with every request that another site's page makes, and a host name that was rebound to
    127.0.0.1 shows in Host; a client that is no browser sends no Origin and passes.
    `host_names` None allows every host name. `origins` are further origins, with scheme, that may read answers.
    """

    def __init__(self, app: ASGIApp, host_names: frozenset[str] | None = None, origins: tuple[str, ...] = ()):
        self.app, self.host_names, self.origins = app, host_names, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self.refusal(headers.get("host", ""), headers.get("origin"))
        if refusal is not None:
            await refusal.response()(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await Response(status_code=204, headers={"Allow": "GET, POST, OPTIONS"})(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, host: str, origin: str | None) -> ApiError | None:
        """Return the 403 for a request with these two headers, or None when it may pass."""
        try:
            name = urlsplit(f"//{host}").hostname
            source = None if origin is None else urlsplit(origin).netloc
        except ValueError:
            return ApiError(400, "Host or Origin is not an address.", code="bad_host")
        if self.host_names is not None and name not in self.host_names:
            return ApiError(403, f"Host {host} is not a name of this server. Use 127.0.0.1 or localhost.", code="bad_host")
        if origin is None or origin in self.origins or source == host:
            return None
        return ApiError(
            403,
            f"Origin {origin} is not this server. Start it with --allow-origin {origin} to let that site's pages use it.",
            code="bad_origin",
        )


class BodyLimit:
    """Refuse a body that is too large (413), whatever its Content-Length says, or that takes too long (408)."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.limits.body_timeout_s

        async def counted() -> Message:
            nonlocal received, is_whole
            try:
                async with asyncio.timeout_at(None if is_whole else deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"The body was not there after {self.limits.body_timeout_s:g} s. Send it faster.", {"Connection": "close"}
                ) from None
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > self.limits.max_body_bytes:
                raise HTTPException(413, f"The body is larger than {self.limits.max_body_bytes} bytes. Send less text.")
            return message

        await self.app(scope, counted, send)
