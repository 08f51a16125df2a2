"""POST /v1/completions: continue one or more prompts."""

from __future__ import annotations

from dataclasses import replace

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from plinth.serving.answer import CompletionLogprobs, Envelope, gather
from plinth.serving.disconnect import until_disconnect
from plinth.serving.errors import bad_request
from plinth.serving.pieces import Piece, Token
from plinth.serving.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest, fit_context
from plinth.serving.records import RequestRecord, record_of
from plinth.serving.server import Server
from plinth.serving.stream import EventStream, completion_chunks
from plinth.serving.ticket import Work


def add_completions(app: FastAPI, server: Server) -> None:
    """Add the route."""

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        return await until_disconnect(request, complete(server, body, record_of(request)))


async def complete(server: Server, request: CompletionRequest, record: RequestRecord) -> Response:
    """Answer one request for completions."""
    server.check_model(request.model)
    request.check()
    works = await completion_works(server, request)
    record.prompt_tokens = sum(len(work.prompt) for work in works) // (request.n or 1)
    envelope = Envelope.completion(server.model_name)
    ticket = server.batcher.submit(works, record)
    with_logprobs = request.logprobs is not None
    if request.stream:
        record.streamed = True
        chunks = completion_chunks(ticket, envelope, server.tokenizer, with_logprobs, request.includes_usage)
        return EventStream(ticket, chunks)
    choices = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": CompletionLogprobs(server.tokenizer)(choice.tokens) if with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(await gather(ticket))
    ]
    return JSONResponse(envelope.wrap(choices, usage=record.usage()))


async def completion_works(server: Server, request: CompletionRequest) -> list[Work]:
    """Return the sequences of a completion: `n` for each prompt, prompt by prompt."""
    wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if wanted == 0 and not request.echo:
        raise bad_request("max_tokens=0 gives nothing without echo=true. Use 1 or more.", param="max_tokens")
    texts = request.prompts()
    server.batcher.check_size(len(texts) * (request.n or 1))  # before anything costly
    prompts = await server.encode(texts, "prompt")
    works = []
    for prompt in prompts:
        max_tokens = fit_context(len(prompt), wanted, server.engine.max_seq_len)
        if wanted:
            added = [Work(prompt, params) for params in request.sampling(max_tokens, request.logprobs)]
        else:
            added = [Work(prompt, None)] * (request.n or 1)
        if request.echo:
            piece = await echoed(server, prompt, request.logprobs, is_all=not wanted)
            added = [replace(work, echo=piece) for work in added]
        works += added
    return works


async def echoed(server: Server, prompt: list[int], logprobs: int | None, is_all: bool) -> Piece:
    """Return a prompt as the first piece of its completion, with its own log-probabilities when they are asked for."""
    tokens = [Token(token, None, []) for token in prompt]
    if logprobs is not None and len(prompt) > 1:
        scored = await server.batcher.call(lambda: server.engine.score_alternatives([prompt], logprobs)[0])
        tokens[1:] = [Token(token, *entry) for token, entry in zip(prompt[1:], scored)]
    return Piece(server.tokenizer.decode(prompt), tuple(tokens), 0, "length" if is_all else None)
