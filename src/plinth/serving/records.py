"""What is known of each HTTP request, for the log and the metrics; never a word of a prompt or of an answer."""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plinth.serving.metrics import Metrics

LOG = logging.getLogger("plinth.requests")


@dataclass
class RequestRecord:
    """One request, from its headers to the last byte of its answer."""

    method: str
    """GET, POST, …"""
    path: str
    """address without the query"""
    id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    """the answer's X-Request-Id"""
    started_s: float = field(default_factory=time.perf_counter)
    """when its headers were there, seconds of a clock that only moves on"""
    status: int = 500
    """HTTP status; 500 until an answer begins"""
    key: str | None = None
    """first digits of the hash of the API key"""
    streamed: bool = False
    """whether the answer is a stream"""
    prompt_tokens: int = 0
    """tokens of all its prompts"""
    completion_tokens: int = 0
    """tokens that were made for it"""
    ttft_s: float | None = None
    """seconds from the headers to the first token"""
    finish_reasons: list[str] = field(default_factory=list)
    """why each of its sequences ended"""

    def age_s(self) -> float:
        """Return the seconds since it began."""
        return time.perf_counter() - self.started_s

    def usage(self) -> dict[str, int]:
        """Return the `usage` object of the answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def line(self) -> dict[str, Any]:
        """Return what the log says of it."""
        said = {
            "id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration_s": round(self.age_s(), 6),
            "key": self.key,
        }
        if self.prompt_tokens:
            said |= {
                "streamed": self.streamed,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
                "finish_reasons": self.finish_reasons,
            }
        return said


def record_of(request: Request) -> RequestRecord:
    """Return the record of a request that is being answered."""
    return request.scope["state"]["record"]


class Recorder:
    """Outermost of the layers: makes each request's record, names it in X-Request-Id, logs and counts it at its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", record.id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.answered(route_of(scope), record.status)
            LOG.info("request", extra={"fields": record.line()})


def route_of(scope: Scope) -> str:
    """Return the route's pattern rather than the path, which clients choose: a metric has few labels."""
    route = scope.get("route")
    return getattr(route, "path", None) or "unknown"


class JsonLines(logging.Formatter):
    """Formats a log record as one JSON object a line: time, level, event, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def log_json(stream: TextIO) -> None:
    """Write all of the server's log, a line for each request too, to `stream` as JSON Lines."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, level in (("plinth", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
