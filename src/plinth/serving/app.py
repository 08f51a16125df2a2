"""The HTTP application: OpenAI's API over one engine, and the chat page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from plinth import __version__
from plinth.inference.text import TextEngine
from plinth.serving import errors
from plinth.serving.chat import add_chat
from plinth.serving.completions import add_completions
from plinth.serving.embeddings import add_embeddings
from plinth.serving.health import add_health
from plinth.serving.keys import ApiKeys, KeyCheck
from plinth.serving.limits import BodyLimit, Limits, SameOrigin
from plinth.serving.page import add_page
from plinth.serving.page_answers import add_page_answers
from plinth.serving.page_beams import add_page_beams
from plinth.serving.records import Recorder
from plinth.serving.server import Server
from plinth.serving.tokens import add_tokens


def create_app(
    text_engine: TextEngine,
    model_name: str,
    *,
    limits: Limits | None = None,
    keys: ApiKeys | None = None,
    is_chat: bool = True,
    host_names: frozenset[str] | None = None,
    origins: tuple[str, ...] = (),
) -> FastAPI:
    """Return the application that serves `text_engine` under `model_name`.

    `keys` are the API keys that open it (None: it is open). `is_chat` tells the page to open as a chat. `host_names` are
    the Host headers that are answered (None: all); pages of `origins` beside the server's own may read answers.
    """
    server = Server(text_engine, model_name, limits or Limits(), is_chat)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    app = FastAPI(title="Plinth", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors.DESCRIBED)
    app.state.server = server
    add_layers(app, server, keys or ApiKeys(), host_names, origins)
    errors.install(app)
    add_page(app)
    for add in (add_health, add_tokens, add_embeddings, add_completions, add_chat, add_page_answers, add_page_beams):
        add(app, server)
    describe_model(app, model_name)
    return app


def describe_model(app: FastAPI, model_name: str) -> None:
    """Name the one model in the OpenAPI description, so that a reader, or a fuzzer, sends requests that are answered."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        schema = describe()
        for component in schema["components"]["schemas"].values():
            if component.get("properties", {}).get("model", {}).get("type") == "string":
                component["properties"]["model"]["enum"] = [model_name]
        return schema

    app.openapi = described  # type: ignore[method-assign]


def add_layers(app: FastAPI, server: Server, keys: ApiKeys, host_names: frozenset[str] | None, origins: tuple[str, ...]) -> None:
    """Add what a request passes before its route, the innermost first."""
    app.add_middleware(BodyLimit, limits=server.limits)
    app.add_middleware(KeyCheck, keys=keys)
    app.add_middleware(SameOrigin, host_names=host_names, origins=origins)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Recorder, metrics=server.metrics)
