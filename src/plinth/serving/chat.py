"""POST /v1/chat/completions: answer a conversation."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from plinth.serving.answer import ChatLogprobs, Envelope, gather
from plinth.serving.disconnect import until_disconnect
from plinth.serving.messages import plain_messages
from plinth.serving.protocol import ChatRequest, fit_context
from plinth.serving.records import RequestRecord, record_of
from plinth.serving.server import Server
from plinth.serving.stream import EventStream, chat_chunks
from plinth.serving.ticket import Work


def add_chat(app: FastAPI, server: Server) -> None:
    """Add the route."""

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await until_disconnect(request, converse(server, body, record_of(request)))


async def converse(server: Server, request: ChatRequest, record: RequestRecord) -> Response:
    """Answer one conversation."""
    server.check_model(request.model)
    request.check()
    prompt = await server.render(plain_messages(request.messages))
    max_tokens = fit_context(len(prompt), request.limit, server.engine.max_seq_len)
    works = [Work(prompt, params) for params in request.sampling(max_tokens, request.num_alternatives)]
    ticket = server.batcher.submit(works, record)
    record.prompt_tokens = len(prompt)
    envelope = Envelope.chat(server.model_name, bool(request.stream))
    if request.stream:
        record.streamed = True
        chunks = chat_chunks(ticket, envelope, server.tokenizer, bool(request.logprobs), request.includes_usage)
        return EventStream(ticket, chunks)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": ChatLogprobs(server.tokenizer)(choice.tokens) if request.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(await gather(ticket))
    ]
    return JSONResponse(envelope.wrap(choices, usage=record.usage()))
