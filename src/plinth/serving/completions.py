"""POST /v1/completions: continue one or more prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from plinth.serving.answer import Choice, CompletionLogprobs, Envelope, gather, headers_of
from plinth.serving.disconnect import until_disconnect
from plinth.serving.errors import bad_request
from plinth.serving.grammars import Structure
from plinth.serving.pieces import Piece, Token
from plinth.serving.prompt_scores import prompt_scores
from plinth.serving.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest, fit_context
from plinth.serving.records import RequestRecord, record_of
from plinth.serving.server import Server
from plinth.serving.stream import DESCRIBED, EventStream
from plinth.serving.ticket import Ticket, Work


def add_completions(app: FastAPI, server: Server) -> None:
    """Add the route."""

    @app.post("/v1/completions", responses=DESCRIBED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        return await until_disconnect(request, complete(server, body, record_of(request)))


async def complete(server: Server, request: CompletionRequest, record: RequestRecord) -> Response:
    """Answer one request for completions."""
    server.check_model(request.model)
    request.check()
    texts = request.prompts()
    server.batcher.check_size(len(texts) * request.num_sequences)  # before anything costly
    prompts = await server.encode(texts, "prompt")
    record.prompt_tokens = sum(map(len, prompts))
    structure = await server.structure(request, wanted_tokens(request))
    scores = [await prompt_scores(server, prompt, request.prompt_logprobs) for prompt in prompts]
    ticket = server.batcher.submit(await completion_works(server, request, prompts, structure), record)
    envelope = Envelope.completion(server.model_name)
    headers = headers_of(structure)
    if request.stream:
        record.streamed = True
        return EventStream(ticket, completion_chunks(ticket, envelope, request, server, structure), headers)
    kept = best_of(await gather(ticket), request.num_sequences, request.n or 1)
    choices = [await wire_choice(server, request, index, choice, structure) for index, choice in enumerate(kept)]
    if request.prompt_logprobs is not None:
        for index, choice in enumerate(choices):
            choice["prompt_logprobs"] = scores[index // (request.n or 1)]
    return JSONResponse(envelope.wrap(choices, usage=record.usage()), headers=headers)


def wanted_tokens(request: CompletionRequest) -> int:
    """Return how many tokens to generate at most. Raises ApiError (400) for none without an echo."""
    wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if wanted == 0 and not request.echo:
        raise bad_request("max_tokens=0 gives nothing without echo=true. Use 1 or more.", param="max_tokens")
    return wanted


async def completion_works(server: Server, request: CompletionRequest, prompts: list[list[int]], structure: Structure | None) -> list[Work]:
    """Return the sequences of a completion, prompt by prompt."""
    wanted, works = wanted_tokens(request), []
    for prompt in prompts:
        max_tokens = fit_context(len(prompt), wanted, server.engine.max_seq_len)
        if wanted:
            params = request.sampling(max_tokens, request.logprobs, server.vocab_size)
            added = [Work(prompt, one, structure.constraint() if structure else None) for one in params]
        else:
            added = [Work(prompt, None)] * request.num_sequences
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


def best_of(choices: list[Choice], made: int, kept: int) -> list[Choice]:
    """Return, of each `made` choices of a prompt, the `kept` with the highest mean log-probability of a token, best first."""
    if made == kept:
        return choices
    groups = [choices[start : start + made] for start in range(0, len(choices), made)]
    return [choice for group in groups for choice in sorted(group, key=lambda choice: -choice.mean_logprob)[:kept]]


async def wire_choice(
    server: Server, request: CompletionRequest, index: int, choice: Choice, structure: Structure | None
) -> dict[str, Any]:
    """Return a whole choice as the wire has it."""
    logprobs = CompletionLogprobs(server.tokenizer)(choice.tokens) if request.logprobs is not None else None
    said = {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
    return said | ({"valid": await structure.valid(choice.written, choice.finish_reason)} if structure else {})


async def completion_chunks(
    ticket: Ticket, envelope: Envelope, request: CompletionRequest, server: Server, structure: Structure | None
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a streamed completion."""
    more: dict[str, Any] = {"usage": None} if request.includes_usage else {}
    logprobs = [CompletionLogprobs(server.tokenizer) for _ in range(ticket.size)]
    written = [""] * ticket.size
    async for index, piece in ticket.pieces():
        written[index] += piece.text
        has_logprobs = request.logprobs is not None
        if not (piece.text or piece.finish_reason or (has_logprobs and piece.tokens)):
            continue
        entry = logprobs[index](piece.tokens) if has_logprobs else None
        choice = {"index": index, "text": piece.text, "logprobs": entry, "finish_reason": piece.finish_reason}
        if structure is not None and piece.finish_reason is not None:
            choice["valid"] = await structure.valid(written[index], piece.finish_reason)
        yield envelope.wrap([choice], **more)
    if request.includes_usage:
        yield envelope.wrap([], usage=ticket.record.usage())
