"""What a client may ask: the fields that completions and chat share, and those of completions, made sampling parameters."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, field_validator

from plinth.config import nearest
from plinth.inference.grammar import Grammar
from plinth.inference.sampling import SamplingParams
from plinth.serving.errors import SHAPES, ApiError, bad_request, shorten
from plinth.serving.structured import ResponseFormat, StructuredOutputs

MAX_STOPS = 4
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default; chat's default is the rest of the context

# Fields whose effect we do not have, with the values that ask for nothing. Any other value is refused by name.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
INSTEAD = {name: "structured_outputs" for name in ("grammar", "guided_choice", "guided_grammar", "guided_json", "guided_regex")} | {
    "functions": "tools",
    "function_call": "tool_choice",
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

MAX_REPETITION_PENALTY = 100.0
MAX_BIASES = 1024
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
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
    typical_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, gt=0, le=MAX_REPETITION_PENALTY, allow_inf_nan=False)
    logit_bias: dict[str, Bias] | None = Field(default=None, max_length=MAX_BIASES)
    allowed_token_ids: list[int] | None = Field(default=None, min_length=1)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

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
                advice = f"Use {INSTEAD[name]}." if name in INSTEAD else "Leave it out."
                raise bad_request(
                    f"{name} is not supported here; it would change the answer. {advice}",
                    param=name,
                    code="unsupported_parameter",
                )
            guess = nearest(name, [*type(self).model_fields, *UNSUPPORTED])
            raise bad_request(f"{name} is not a field of this request.{guess}", param=name, code="unknown_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is given without stream=true. Leave it out.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs comes with whole answers only. Leave out stream.", param="prompt_logprobs")
        if self.response_format is not None and self.structured_outputs is not None:
            raise bad_request("response_format and structured_outputs are both given. Leave out one.", param="response_format")

    @property
    def num_sequences(self) -> int:
        """Sequences that each prompt asks for."""
        return self.n or 1

    @property
    def is_structured(self) -> bool:
        """Whether the answers' form is given."""
        return self.structured_outputs is not None or (self.response_format is not None and self.response_format.type != "text")

    def grammar(self) -> Grammar | None:
        """Return what each answer must be, None for any text. Raises ApiError."""
        if self.response_format is not None:
            return self.response_format.grammar()
        return self.structured_outputs.grammar() if self.structured_outputs is not None else None

    def sampling(self, max_tokens: int, logprobs: int | None, vocab_size: int) -> list[SamplingParams]:
        """Return the parameters of each of the sequences of a prompt. Raises ApiError (400) for what cannot be.

        Sequence `i` of a seeded request draws with seed + i, so that choice 0 is what n=1 gives.
        """
        try:
            params = SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k if self.top_k and self.top_k > 0 else None,
                top_p=self.top_p,
                min_p=self.min_p or None,
                typical_p=self.typical_p,
                presence_penalty=self.presence_penalty or None,
                frequency_penalty=self.frequency_penalty or None,
                repetition_penalty=self.repetition_penalty,
                logit_bias=tuple((token_id(name), bias) for name, bias in (self.logit_bias or {}).items()),
                allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
                min_tokens=self.min_tokens or 0,
                ignore_eos=bool(self.ignore_eos),
                max_tokens=max_tokens,
                stop=self.stops,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                logprobs=logprobs,
            )
            params.check_ids(vocab_size)
        except ValueError as error:
            field = re.match(r"\w*", str(error))
            raise bad_request(str(error), param=field[0] if field and field[0] in type(self).model_fields else None) from error
        if self.seed is None:
            return [params] * self.num_sequences
        return [replace(params, seed=(self.seed + i) % 2**63) for i in range(self.num_sequences)]


def token_id(name: str) -> int:
    """Return the token id that a key of logit_bias spells. Raises ApiError (400)."""
    if not (name.isascii() and name.isdecimal() and len(name) < 12):
        raise bad_request(f"logit_bias has the key {shorten(name)}; keys are token ids, such as '15'.", param="logit_bias")
    return int(name)


class CompletionRequest(SamplingRequest):
    """The body of POST /v1/completions."""

    prompt: Prompts = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    def check(self) -> None:
        """Also check the fields that depend on one another."""
        super().check()
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise bad_request(f"best_of={self.best_of} is less than n={self.n}. Raise it or lower n.", param="best_of")
        if self.num_sequences > (self.n or 1) and self.stream:
            raise bad_request("best_of chooses among whole answers; it cannot be streamed. Leave out stream.", param="best_of")
        if self.echo and self.is_structured:
            raise bad_request("echo with structured output is not supported here. Leave out one.", param="echo")

    @property
    def num_sequences(self) -> int:
        """Sequences that each prompt asks for, those that best_of drops too."""
        return self.best_of or self.n or 1

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, one entry each. Raises ApiError for an empty list."""
        return listed("" if self.prompt is None else self.prompt, "prompt")


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
