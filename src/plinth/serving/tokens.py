"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer over HTTP, as vLLM and lm-eval's remote tokenizer have it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from plinth.serving.answer import token_name
from plinth.serving.errors import bad_request
from plinth.serving.messages import Message, plain_messages
from plinth.serving.server import Server
from plinth.tokenizer.chat_template import CHAT_TEMPLATE

MAX_TEXT_CHARACTERS = 2**18  # a text without a space takes the tokenizer long


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a text, or a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    """of a text; this server's tokenizers add none, so both values give the same"""
    add_generation_prompt: bool | None = None
    """of a conversation: end with the assistant's header; true by default"""
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[int]


def add_tokens(app: FastAPI, server: Server) -> None:
    """Add the routes."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Return the token ids of a text, or of a rendered conversation. A special token typed in a text stays text."""
        server.check_model(body.model)
        tokens = await request_tokens(server, body)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": server.engine.max_seq_len}
        names = [token_name(server.tokenizer, token) for token in tokens] if body.return_token_strs else None
        return answer | {"token_strs": names}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """Return the text of token ids, special tokens spelled."""
        server.check_model(body.model)
        size = server.vocab_size
        if any(not 0 <= token < size for token in body.tokens):
            raise bad_request(f"tokens holds an id outside 0 to {size - 1}.", param="tokens")
        return {"prompt": server.tokenizer.decode(body.tokens, skip_special=False)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Return the tokenizer's settings: its special tokens and its chat template."""
        config = server.tokenizer.config
        known = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {
            **config,
            **known,
            "chat_template": server.tokenizer.chat_template() or CHAT_TEMPLATE,
            "vocab_size": server.tokenizer.vocab_size,
        }


async def request_tokens(server: Server, body: TokenizeRequest) -> list[int]:
    """Return the tokens of a request's text or conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give one of prompt and messages.", param="prompt")
    if body.prompt is not None:
        text = body.prompt
        if len(text) > MAX_TEXT_CHARACTERS:
            raise bad_request(f"prompt has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} are taken.", param="prompt")
        return await server.aside(len(text), lambda: server.tokenizer.encode(text), "prompt")
    messages = plain_messages(body.messages or [])
    return await server.render(messages, answering=body.add_generation_prompt is not False)
