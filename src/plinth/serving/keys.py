"""API keys: who may use the server. They are kept as hashes, compared in constant time, and never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from plinth.config import UserError
from plinth.serving.errors import ApiError

SHOWN_DIGITS = 8  # of a key's hash, in the log
OPEN_PATHS = frozenset({"/", "/health", "/healthz"})
OPEN_FOLDER = "/web/"  # the page's own files hold no secret


class ApiKeys:
    """The keys that open a server; none at all leaves it open."""

    def __init__(self, keys: Iterable[str] = ()):
        self._hashes = [_hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def find(self, key: str) -> str | None:
        """Return the name of a key for the log, the first digits of its hash, or None for a key that opens nothing."""
        given = _hash(key)
        found = [hmac.compare_digest(given, known) for known in self._hashes]  # all of them: the time does not tell which
        return given.hex()[:SHOWN_DIGITS] if any(found) else None


def read_keys(path: Path | None, from_environment: str | None) -> ApiKeys:
    """Return the keys of a file, one a line, and the one of PLINTH_API_KEY. Raises UserError for a file without keys."""
    keys = [from_environment.strip()] if from_environment and from_environment.strip() else []
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"api_key_file={path} cannot be read: {error}.") from None
        in_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not in_file:
            raise UserError(f"api_key_file={path} holds no key: the server would be open. Write one key a line.")
        keys += in_file
    return ApiKeys(keys)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyCheck:
    """Answer 401 to requests without a known key in `Authorization: Bearer`; the page and the health check stay open."""

    def __init__(self, app: ASGIApp, keys: ApiKeys):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and not is_open(scope["path"]):
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            name = self.keys.find(key.strip()) if kind.lower() == "bearer" else None
            if name is None:
                await refusal(bool(kind)).response()(scope, receive, send)
                return
            scope["state"]["record"].key = name
        await self.app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether an address needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def refusal(is_given: bool) -> ApiError:
    """Return the 401 for a wrong key, or for none."""
    if is_given:
        return ApiError(401, "The API key is not one of this server's.", code="invalid_api_key")
    return ApiError(401, "This server needs an API key: send it as `Authorization: Bearer KEY`.", code="missing_api_key")
