"""POST /v1/chat/completions: answer a conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from plinth.serving.answer import ChatLogprobs, Choice, Envelope, gather, headers_of
from plinth.serving.chat_request import ChatRequest
from plinth.serving.disconnect import until_disconnect
from plinth.serving.grammars import Structure
from plinth.serving.messages import plain_messages
from plinth.serving.prompt_scores import prompt_scores
from plinth.serving.protocol import fit_context
from plinth.serving.records import RequestRecord, record_of
from plinth.serving.server import Server
from plinth.serving.stream import DESCRIBED, EventStream
from plinth.serving.ticket import Ticket, Work
from plinth.serving.turn import Turn


def add_chat(app: FastAPI, server: Server) -> None:
    """Add the route."""

    @app.post("/v1/chat/completions", responses=DESCRIBED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await until_disconnect(request, converse(server, body, record_of(request)))


async def converse(server: Server, request: ChatRequest, record: RequestRecord) -> Response:
    """Answer one conversation."""
    server.check_model(request.model)
    request.check()
    server.batcher.check_size(request.num_sequences)
    messages, dropped = plain_messages(request.messages), 0
    if (request.truncation or server.truncation) == "auto":
        window = await server.fitting(messages, request.limit, request.offered_tools)
        messages, dropped = window.messages, len(window.dropped)
    prompt = await server.render(messages, request.offered_tools)
    record.prompt_tokens = len(prompt)
    max_tokens = fit_context(len(prompt), request.limit, server.engine.max_seq_len)
    params = request.sampling(max_tokens, request.num_alternatives, server.vocab_size)
    structure = await server.structure(request, max_tokens)
    scores = await prompt_scores(server, prompt, request.prompt_logprobs)
    works = [Work(prompt, one, structure.constraint() if structure else None) for one in params]
    ticket = server.batcher.submit(works, record)
    envelope = Envelope.chat(server.model_name, bool(request.stream))
    headers = headers_of(structure) | ({"X-Plinth-Dropped-Messages": str(dropped)} if dropped else {})
    if request.stream:
        record.streamed = True
        return EventStream(ticket, chat_chunks(ticket, envelope, request, server, structure, dropped), headers)
    gathered = await gather(ticket)
    choices = [await wire_choice(server, request, index, choice, structure) for index, choice in enumerate(gathered)]
    more: dict[str, Any] = {} if request.prompt_logprobs is None else {"prompt_logprobs": scores}
    more |= {"dropped_messages": dropped} if dropped else {}
    return JSONResponse(envelope.wrap(choices, usage=record.usage(), **more), headers=headers)


async def wire_choice(server: Server, request: ChatRequest, index: int, choice: Choice, structure: Structure | None) -> dict[str, Any]:
    """Return a whole choice as the wire has it."""
    turn = Turn(request.tool_names)
    for _ in turn.push(choice.text, choice.finish_reason):
        pass
    said = {
        "index": index,
        "message": turn.message(),
        "logprobs": ChatLogprobs(server.tokenizer)(choice.tokens) if request.logprobs else None,
        "finish_reason": turn.finish_reason,
    }
    return said | await verdict(structure, choice.text, choice.finish_reason)


async def verdict(structure: Structure | None, text: str, reason: str | None) -> dict[str, bool]:
    """Return {valid}, whether a finished answer is what was asked for; {} where nothing was."""
    return {"valid": await structure.valid(text, reason)} if structure else {}


async def chat_chunks(
    ticket: Ticket, envelope: Envelope, request: ChatRequest, server: Server, structure: Structure | None, dropped: int = 0
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a streamed chat: the role, then text and calls, then the reason of the end."""
    more: dict[str, Any] = ({"usage": None} if request.includes_usage else {}) | ({"dropped_messages": dropped} if dropped else {})
    logprobs = ChatLogprobs(server.tokenizer)
    turns = [Turn(request.tool_names) for _ in range(ticket.size)]

    def chunk(index: int, delta: dict[str, Any], entry: Any = None, reason: str | None = None, **said: Any) -> dict[str, Any]:
        return envelope.wrap([{"index": index, "delta": delta, "logprobs": entry, "finish_reason": reason, **said}], **more)

    for index in range(ticket.size):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, piece in ticket.pieces():
        turn = turns[index]
        entry = logprobs(piece.tokens) if request.logprobs and piece.tokens else None
        deltas = list(turn.push(piece.text, piece.finish_reason)) or ([{"content": ""}] if entry else [])
        for position, delta in enumerate(deltas):
            yield chunk(index, delta, entry if position == 0 else None)
        if piece.finish_reason:
            yield chunk(index, {}, reason=turn.finish_reason, **await verdict(structure, turn.text, piece.finish_reason))
    if request.includes_usage:
        yield envelope.wrap([], usage=ticket.record.usage())
