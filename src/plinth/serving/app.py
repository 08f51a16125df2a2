"""The HTTP application: OpenAI's completions and chat over one engine, and the chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

from plinth import __version__
from plinth.config import UserError
from plinth.inference.text import TextEngine
from plinth.serving import errors
from plinth.serving.answer import ChatLogprobs, Choice, CompletionLogprobs, Envelope, Tally
from plinth.serving.batcher import Batcher, Ticket, Work
from plinth.serving.errors import ApiError, bad_request
from plinth.serving.limits import BodyLimit, SameOrigin
from plinth.serving.page import page_response
from plinth.serving.pieces import Piece, Token
from plinth.serving.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    fit_context,
)
from plinth.serving.stream import EventStream, chat_chunks, completion_chunks

T = TypeVar("T")
CLIENT_LEFT = 499  # a status that nobody reads: the client is gone


class Server:
    """What the routes share: the engine, its thread, and the name that the model is served under."""

    def __init__(self, text_engine: TextEngine, model_name: str, max_queue: int, is_chat: bool):
        self.text_engine, self.tokenizer, self.engine = text_engine, text_engine.tokenizer, text_engine.engine
        self.model_name, self.is_chat = model_name, is_chat
        self.batcher = Batcher(text_engine, max_queue)
        self.created = int(time.time())

    def check(self, request: SamplingRequest) -> None:
        """Raise ApiError for another model's name (404), or for a field that cannot be had (400)."""
        if request.model != self.model_name:
            raise self.unknown_model(request.model)
        request.check()

    def unknown_model(self, name: str) -> ApiError:
        """Return the 404 for a model that is not served."""
        message = f"model {name!r} is not served here. Known: {self.model_name}."
        return ApiError(404, message, param="model", code="model_not_found")

    def prompt_tokens(self, request: CompletionRequest) -> list[list[int]]:
        """Return the tokens of each prompt of a completion; an empty text stands for the start of a document."""
        try:
            prompts = [self.text_engine.encode(prompt) for prompt in request.prompts()]
        except UserError as error:
            raise bad_request(str(error), param="prompt") from None
        vocab_size = self.engine.model.config.vocab_size
        if any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
            raise bad_request(f"prompt holds a token id outside 0 to {vocab_size - 1}.", param="prompt")
        if not all(prompts):
            raise bad_request("prompt is empty, and this model has no token that starts a text. Give one.", param="prompt")
        return prompts

    def chat_tokens(self, request: ChatRequest) -> list[int]:
        """Return the tokens of a conversation, up to where the answer starts."""
        try:
            return self.text_engine.render(request.plain_messages())
        except UserError as error:
            raise bad_request(str(error), param="messages") from None

    def works(self, request: SamplingRequest, prompt: list[int], wanted: int | None, logprobs: int | None) -> list[Work]:
        """Return the sequences that one prompt asks for, `n` of them."""
        max_tokens = fit_context(len(prompt), wanted, self.engine.max_seq_len)
        return [Work(prompt, params) for params in request.sampling(max_tokens, logprobs)]

    async def echoed(self, prompt: list[int], logprobs: int | None, is_all: bool) -> Piece:
        """Return a prompt as the first piece of its completion, with its own log-probabilities when they are asked for."""
        tokens = [Token(token, None, []) for token in prompt]
        if logprobs is not None and len(prompt) > 1:
            scored = await self.batcher.call(lambda: self.engine.score_alternatives([prompt], logprobs)[0])
            tokens[1:] = [Token(token, *entry) for token, entry in zip(prompt[1:], scored)]
        return Piece(self.tokenizer.decode(prompt), tuple(tokens), 0, "length" if is_all else None)

    def model(self) -> dict[str, Any]:
        """Return the model's entry in /v1/models; max_model_len (tokens) and chat are our extensions."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "plinth",
            "max_model_len": self.engine.max_seq_len,
            "chat": self.is_chat,
        }


def create_app(
    text_engine: TextEngine,
    model_name: str,
    *,
    max_queue: int = 64,
    is_chat: bool = True,
    host_names: frozenset[str] | None = None,
    origins: tuple[str, ...] = (),
) -> FastAPI:
    """Return the application that serves `text_engine` under `model_name`.

    `max_queue` sequences may wait beside those in the batch; more are answered with 429. `is_chat` tells the page to
    open as a chat. `host_names` are the Host headers that are answered (None: all); pages of `origins` beside the
    server's own may read answers.
    """
    server = Server(text_engine, model_name, max_queue, is_chat)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.batcher.close)

    app = FastAPI(title="Plinth", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(BodyLimit)
    app.add_middleware(SameOrigin, host_names=host_names, origins=origins)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    errors.install(app)
    add_model_routes(app, server)
    add_generation_routes(app, server)
    return app


def add_model_routes(app: FastAPI, server: Server) -> None:
    """Add the page, the health check and the list of models."""

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Return the chat page."""
        return page_response("index.html")

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Tell whether the engine runs, and how many sequences are in the batch and wait for it."""
        alive = server.batcher.is_alive
        body = {
            "status": "ok" if alive else "engine stopped",
            "model": server.model_name,
            "active": server.batcher.num_active,
            "waiting": server.batcher.num_waiting,
            "max_batch": server.batcher.max_batch,
        }
        return JSONResponse(body, status_code=200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Return the model's entry."""
        if name != server.model_name:
            raise server.unknown_model(name)
        return server.model()


def add_generation_routes(app: FastAPI, server: Server) -> None:
    """Add completions and chat."""

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        return await until_disconnect(request, complete(server, body))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await until_disconnect(request, converse(server, body))


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


async def complete(server: Server, request: CompletionRequest) -> Response:
    """Answer POST /v1/completions."""
    server.check(request)
    works = await completion_works(server, request)
    tally = Tally(prompt=sum(len(work.prompt) for work in works) // (request.n or 1))
    envelope = Envelope.completion(server.model_name)
    ticket = server.batcher.submit(works)
    with_logprobs = request.logprobs is not None
    if request.stream:
        chunks = completion_chunks(ticket, envelope, server.tokenizer, tally, with_logprobs, request.includes_usage)
        return EventStream(ticket, chunks)
    choices = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": CompletionLogprobs(server.tokenizer)(choice.tokens) if with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(await gather(ticket, tally))
    ]
    return JSONResponse(envelope.wrap(choices, usage=tally.usage()))


async def completion_works(server: Server, request: CompletionRequest) -> list[Work]:
    """Return the sequences of a completion: `n` for each prompt, prompt by prompt."""
    wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if wanted == 0 and not request.echo:
        raise bad_request("max_tokens=0 gives nothing without echo=true. Use 1 or more.", param="max_tokens")
    works = []
    for prompt in server.prompt_tokens(request):
        if wanted:
            added = server.works(request, prompt, wanted, request.logprobs)
        else:
            fit_context(len(prompt), 0, server.engine.max_seq_len)
            added = [Work(prompt, None)] * (request.n or 1)
        if request.echo:
            piece = await server.echoed(prompt, request.logprobs, is_all=not wanted)
            added = [replace(work, echo=piece) for work in added]
        works += added
    return works


async def converse(server: Server, request: ChatRequest) -> Response:
    """Answer POST /v1/chat/completions."""
    server.check(request)
    prompt = server.chat_tokens(request)
    ticket = server.batcher.submit(server.works(request, prompt, request.limit, request.num_alternatives))
    tally = Tally(prompt=len(prompt))
    envelope = Envelope.chat(server.model_name, bool(request.stream))
    if request.stream:
        chunks = chat_chunks(ticket, envelope, server.tokenizer, tally, bool(request.logprobs), request.includes_usage)
        return EventStream(ticket, chunks)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": ChatLogprobs(server.tokenizer)(choice.tokens) if request.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(await gather(ticket, tally))
    ]
    return JSONResponse(envelope.wrap(choices, usage=tally.usage()))


async def gather(ticket: Ticket, tally: Tally) -> list[Choice]:
    """Await all sequences of a ticket. When this is cancelled, so is the ticket."""
    choices = [Choice() for _ in range(ticket.size)]
    try:
        async for index, piece in ticket.pieces():
            tally.completion += piece.num_generated
            choices[index].add(piece)
    finally:
        ticket.cancel()
    return choices
