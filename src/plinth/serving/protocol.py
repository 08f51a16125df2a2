"""What a client may ask: the request types of OpenAI's completions and chat, checked and made sampling parameters."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, field_validator

from plinth.config import nearest
from plinth.inference.sampling import SamplingParams
from plinth.serving.errors import SHAPES, ApiError, bad_request
from plinth.serving.messages import Message

MAX_STOPS = 4
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default; chat's default is the rest of the context

# Fields whose effect we do not have, with the values that ask for nothing. Any other value is refused by name.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Fields that change nothing about the answer: accepted and left alone.
HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _prompts(value: Any) -> Any:
    """Check a prompt by hand: a union of list types would try each of them on every item of a long list."""
    if value is None or isinstance(value, str) or _is_list_of(value, str) or _is_list_of(value, int):
        return value
    if _is_list_of(value, list) and all(_is_list_of(item, int) for item in value):
        return value
    raise ValueError(f"must be {SHAPES['prompt']}")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


Prompts = Annotated[Any, PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])]


def listed(prompt: Any, param: str) -> list[str] | list[list[int]]:
    """Return the prompts, one entry each. Raises ApiError (400) for an empty list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or any(item == [] for item in prompt):
        raise bad_request(f"{param} is empty. Give a text or at least one token id.", param=param)
    return [prompt] if isinstance(prompt[0], int) else prompt


class StreamOptions(BaseModel):
    """`stream_options`: what a stream carries besides text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """The fields that completions and chat share. A null means the default, everywhere."""

    model_config = ConfigDict(strict=True, extra="allow", ser_json_inf_nan="null")

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"has {len(stop)} strings; at most {MAX_STOPS} are allowed")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raise ApiError (400) for a field that we do not have, or whose meaning we cannot give."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in HARMLESS or value in UNSUPPORTED.get(name, ()):
                continue
            if name in UNSUPPORTED:
                raise bad_request(
                    f"{name} is not supported here; it would change the answer. Leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
            guess = nearest(name, [*type(self).model_fields, *UNSUPPORTED])
            raise bad_request(f"{name} is not a field of this request.{guess}", param=name, code="unknown_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is given without stream=true. Leave it out.", param="stream_options")

    def sampling(self, max_tokens: int, logprobs: int | None) -> list[SamplingParams]:
        """Return the parameters of each of the `n` choices.

        The choice `i` of a seeded request draws with seed + i, so that choice 0 is what n=1 gives.
        """
        try:
            return [
                SamplingParams(
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_k=self.top_k if self.top_k and self.top_k > 0 else None,
                    top_p=self.top_p,
                    min_p=self.min_p or None,
                    max_tokens=max_tokens,
                    stop=self.stops,
                    stop_token_ids=tuple(self.stop_token_ids or ()),
                    seed=None if self.seed is None else (self.seed + choice) % 2**63,
                    logprobs=logprobs,
                )
                for choice in range(self.n or 1)
            ]
        except ValueError as error:
            raise bad_request(str(error)) from error


class CompletionRequest(SamplingRequest):
    """The body of POST /v1/completions."""

    prompt: Prompts = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, one entry each. Raises ApiError for an empty list."""
        return listed("" if self.prompt is None else self.prompt, "prompt")


class ChatRequest(SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def check(self) -> None:
        """Also check the fields that depend on one another."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs is given without logprobs=true.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad_request(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ. Give one.",
                param="max_completion_tokens",
            )
        if self.max_tokens == 0:
            raise bad_request("max_tokens=0 leaves nothing to answer with. Use 1 or more.", param="max_tokens")

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with, None for the rest of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_alternatives(self) -> int | None:
        """How many alternatives to return for each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def fit_context(num_prompt: int, wanted: int | None, max_seq_len: int) -> int:
    """Return how many tokens to generate after a prompt of `num_prompt`, at most `wanted` (None: all that fit).

    Raises ApiError (400, context_length_exceeded) when prompt and `wanted` do not fit into `max_seq_len`.
    """
    room = max_seq_len - num_prompt
    if room < (0 if wanted == 0 else 1):
        raise ApiError(
            400,
            f"The prompt has {num_prompt} tokens; the model's context holds {max_seq_len}, of which at least 1 is for "
            "the answer. Shorten the prompt.",
            code="context_length_exceeded",
        )
    if wanted is None:
        return room
    if wanted > max(room, 0):
        raise ApiError(
            400,
            f"max_tokens={wanted} and the prompt's {num_prompt} tokens exceed the model's context of {max_seq_len}. "
            f"Use max_tokens of {max(room, 0)} or less, or leave it out of a chat.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return wanted
