"""What a server refuses before it reads a request: foreign origins, foreign host names, bodies that are too large."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plinth.serving.errors import ApiError

MAX_BODY_BYTES = 8 * 2**20
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


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
        if self.host_names is not None and urlsplit(f"//{host}").hostname not in self.host_names:
            return ApiError(403, f"Host {host} is not a name of this server. Use 127.0.0.1 or localhost.", code="bad_host")
        if origin is None or origin in self.origins or urlsplit(origin).netloc == host:
            return None
        return ApiError(
            403,
            f"Origin {origin} is not this server. Start it with --allow-origin {origin} to let that site's pages use it.",
            code="bad_origin",
        )


class BodyLimit:
    """Refuse a body of more than `limit_bytes` with 413, whatever its Content-Length says."""

    def __init__(self, app: ASGIApp, limit_bytes: int = MAX_BODY_BYTES):
        self.app, self.limit_bytes = app, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit_bytes:
                raise HTTPException(413, f"The body is larger than {self.limit_bytes} bytes. Send less text.")
            return message

        await self.app(scope, counted, send)
