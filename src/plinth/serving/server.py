"""What the routes share: the engine, its thread, the name that the model is served under, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from plinth.config import UserError
from plinth.inference.memory import Window, fit_window
from plinth.inference.text import TextEngine
from plinth.serving.batcher import Batcher
from plinth.serving.errors import ApiError, bad_request
from plinth.serving.grammars import Grammars, Structure
from plinth.serving.limits import Limits
from plinth.serving.metrics import Metrics
from plinth.serving.protocol import SamplingRequest
from plinth.tokenizer.chat import render

T = TypeVar("T")
LOOP_CHARACTERS = 20_000  # cut into tokens in the event loop's own thread; more would hold up the others' streams


class Server:
    """One model behind HTTP."""

    def __init__(self, text_engine: TextEngine, model_name: str, limits: Limits, is_chat: bool):
        self.text_engine, self.tokenizer, self.engine = text_engine, text_engine.tokenizer, text_engine.engine
        self.model_name, self.limits, self.is_chat = model_name, limits, is_chat
        self.metrics = Metrics(model_name)
        self.batcher = Batcher(text_engine, limits, self.metrics)
        self.grammars = Grammars(text_engine)
        self.created = int(time.time())

    @property
    def truncation(self) -> str:
        """What happens to conversations that do not fit where a request does not say, in the words of its field."""
        return "auto" if self.limits.context_policy == "drop-oldest" else "disabled"

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return self.engine.vocab_size

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for another model's name; None is this one."""
        if name is not None and name != self.model_name:
            raise self.unknown_model(name)

    def unknown_model(self, name: str) -> ApiError:
        """Return the 404 for a model that is not served."""
        message = f"model {name!r} is not served here. Known: {self.model_name}."
        return ApiError(404, message, param="model", code="model_not_found")

    @cached_property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.tokenizer.token_bytes(token)) for token in range(self.tokenizer.vocab_size))

    def check_length(self, texts: Iterable[str], param: str) -> None:
        """Raise ApiError (400) for texts that surely exceed the context, before they are cut into tokens, which takes its time."""
        for text in texts:
            least = len(text) // self.longest_token_bytes  # a token holds no more characters than bytes
            if least > self.engine.max_seq_len:
                raise ApiError(
                    400,
                    f"{param} has more than {least} tokens; the model's context holds {self.engine.max_seq_len}. Shorten it.",
                    param=param,
                    code="context_length_exceeded",
                )

    async def encode(self, texts: Sequence[str] | Sequence[list[int]], param: str) -> list[list[int]]:
        """Return the tokens of each text; an empty text stands for the start of a document. ApiError names the field `param`."""
        self.check_length((text for text in texts if isinstance(text, str)), param)
        prompts = await self.aside(sum(map(len, texts)), lambda: [self.text_engine.encode(text) for text in texts], param)
        vocab_size = self.vocab_size
        if any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
            raise bad_request(f"{param} holds a token id outside 0 to {vocab_size - 1}.", param=param)
        if not all(prompts):
            raise bad_request(f"{param} is empty, and this model has no token that starts a text. Give one.", param=param)
        return prompts

    async def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, answering: bool = True
    ) -> list[int]:
        """Return the tokens of a conversation, with `answering` up to where the answer starts. Raises ApiError."""
        size = sum(len(message["content"]) for message in messages) + (len(json.dumps(tools)) if tools else 0)
        self.check_length((message["content"] for message in messages), "messages")

        def tokens() -> list[int]:
            return render(self.tokenizer, messages, add_generation_prompt=answering, tools=tools or None).tokens

        return await self.aside(size, tokens, "messages")

    async def fitting(self, messages: list[dict[str, Any]], answer_tokens: int | None, tools: list[dict[str, Any]] | None) -> Window:
        """Return what of a conversation fits the context behind room for the answer (None: a quarter of the context).

        Raises ApiError when the system's messages and the last exchange alone do not fit.
        """
        limit = self.engine.max_seq_len
        self.check_length((message["content"] for message in messages), "messages")

        def count(kept: list[dict[str, Any]]) -> int:
            return len(render(self.tokenizer, kept, add_generation_prompt=True, tools=tools or None).tokens)

        room = limit - min(limit - 1, limit // 4 if answer_tokens is None else answer_tokens)
        size = sum(len(message["content"]) for message in messages)
        try:
            return await self.aside(size, lambda: fit_window(messages, room, count), "messages")
        except ApiError as error:
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None

    async def structure(self, request: SamplingRequest, max_tokens: int) -> Structure | None:
        """Return what the answers to a request must be, None for any text. Raises ApiError (400)."""
        if not request.is_structured:
            return None
        return await self.grammars.structure(request.grammar, max_tokens)

    async def aside(self, size: int, function: Callable[[], T], param: str) -> T:
        """Return what `function` returns, in another thread where it handles `size` characters and that is much."""
        try:
            return await asyncio.to_thread(function) if size > LOOP_CHARACTERS else function()
        except UserError as error:
            raise bad_request(str(error), param=param) from None

    def close(self) -> None:
        """Stop the threads."""
        self.batcher.close()
        self.grammars.close()

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
