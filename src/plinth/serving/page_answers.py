"""What the page asks for beside OpenAI's API: answers that name each token, so that another can be taken, and distributions."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from plinth.inference.blocks import OutOfBlocks
from plinth.serving.answer import headers_of
from plinth.serving.disconnect import until_disconnect
from plinth.serving.errors import bad_request
from plinth.serving.grammars import Structure
from plinth.serving.messages import Message
from plinth.serving.page_place import Place, cache_full, describe, place_tokens
from plinth.serving.pieces import Token
from plinth.serving.protocol import SamplingRequest, fit_context
from plinth.serving.records import RequestRecord, record_of
from plinth.serving.server import Server
from plinth.serving.stream import EventStream
from plinth.serving.ticket import Ticket, Work
from plinth.tokenizer.encode import Tokenizer

ALTERNATIVES = 8  # shown beside each token of an answer


class GenerateRequest(SamplingRequest):
    """The body of POST /page/generate: a place, and how to go on from it."""

    messages: list[Message] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    tokens: list[int] = []


class NextRequest(Place):
    """The body of POST /page/next."""

    count: int = Field(default=40, ge=1, le=1000)
    """tokens to name, the most probable ones"""


def add_page_answers(app: FastAPI, server: Server) -> None:
    """Add the routes."""

    @app.post("/page/generate", include_in_schema=False)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Stream an answer token by token."""
        return await until_disconnect(request, answer(server, body, record_of(request)))

    @app.post("/page/next", include_in_schema=False)
    async def next_token(body: NextRequest, request: Request) -> Response:
        """Return the distribution of the next token."""
        return await until_disconnect(request, distribution(server, body))


async def answer(server: Server, request: GenerateRequest, record: RequestRecord) -> Response:
    """Answer one POST /page/generate."""
    server.check_model(request.model)
    request.check()
    if (request.n or 1) != 1:
        raise bad_request("n is 1 here: a page shows one answer at a time.", param="n")
    prompt = await place_tokens(server, request.messages, request.prompt, request.tokens)
    max_tokens = fit_context(len(prompt), request.max_tokens, server.engine.max_seq_len)
    (params,) = request.sampling(max_tokens, ALTERNATIVES, server.vocab_size)
    structure = await server.structure(request, max_tokens + len(request.tokens))
    constraint = structure.constraint(behind=request.tokens) if structure else None
    ticket = server.batcher.submit([Work(prompt, params, constraint)], record)
    record.prompt_tokens, record.streamed = len(prompt), True
    before = server.tokenizer.decode(request.tokens)
    return EventStream(ticket, answer_events(ticket, server.tokenizer, structure, before), headers_of(structure))


async def answer_events(ticket: Ticket, tokenizer: Tokenizer, structure: Structure | None, text: str) -> AsyncIterator[dict[str, Any]]:
    """Yield {tokens, finish_reason} for each piece of an answer that goes on from `text`; at the end of a structured one also valid."""
    async for _, piece in ticket.pieces():
        text += piece.text
        if piece.tokens or piece.finish_reason:
            said: dict[str, Any] = {
                "tokens": [token_event(tokenizer, token) for token in piece.tokens],
                "finish_reason": piece.finish_reason,
            }
            if structure is not None and piece.finish_reason is not None:
                said["valid"] = await structure.valid(text, piece.finish_reason)
            yield said


def token_event(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """Return a token for the page, with its alternatives as `top`."""
    assert token.logprob is not None
    return describe(tokenizer, token.id, token.logprob) | {"top": [describe(tokenizer, *other) for other in token.top_logprobs]}


async def distribution(server: Server, request: NextRequest) -> Response:
    """Answer one POST /page/next: the most probable tokens, and all log-probabilities sorted, base64 of float32 (V,)."""
    server.check_model(request.model)
    prompt = await place_tokens(server, request.messages, request.prompt, request.tokens)
    fit_context(len(prompt), 0, server.engine.max_seq_len)
    logprobs_V, ids_V = await server.batcher.call(lambda: sorted_logprobs(server, prompt))
    best = zip(ids_V[: request.count].tolist(), logprobs_V[: request.count].tolist())
    packed = base64.b64encode(logprobs_V.numpy().astype("<f4").tobytes()).decode()
    return JSONResponse({"tokens": [describe(server.tokenizer, *entry) for entry in best], "logprobs": packed})


def sorted_logprobs(server: Server, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of the token after a prompt, most probable first, the lower id first among equals; and the ids."""
    with server.engine.search() as space:
        try:
            _, logits_V = space.start(prompt)
        except OutOfBlocks as error:
            raise cache_full(error) from None
        return logits_V.float().log_softmax(-1).cpu().sort(descending=True, stable=True)
