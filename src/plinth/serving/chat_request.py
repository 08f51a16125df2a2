"""The body of POST /v1/chat/completions, with its tools."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from plinth.config import UserError
from plinth.inference.grammar import Grammar
from plinth.inference.tool_calls import tool_grammar
from plinth.serving.errors import bad_request
from plinth.serving.messages import Message
from plinth.serving.protocol import MAX_TOP_LOGPROBS, SamplingRequest
from plinth.tokenizer.tool_format import check_tools

MAX_TOOLS = 128


class NamedFunction(BaseModel):
    """The name of a tool."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedTool(BaseModel):
    """`tool_choice` that names the tool to call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None

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
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise bad_request("tool_choice is given without tools.", param="tool_choice")
        if self.tools:
            try:
                check_tools(self.tools)
            except UserError as error:
                raise bad_request(str(error), param="tools") from None
        if self.offered_tools and super().is_structured:
            raise bad_request("response_format and structured_outputs exclude tools. Leave out one.", param="tools")

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that may be called: none with tool_choice='none'."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def is_structured(self) -> bool:
        """Whether the answers' form is given, as that of calls is."""
        return bool(self.offered_tools) or super().is_structured

    @property
    def tool_names(self) -> list[str] | None:
        """Names of the tools that may be called; None where the answer is text only."""
        return [tool["function"]["name"] for tool in self.offered_tools] or None

    def grammar(self) -> Grammar | None:
        """Return what each answer must be: of tools, text and well-formed calls. Raises ApiError."""
        if not self.offered_tools:
            return super().grammar()
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice or "auto"
        is_strict = all(isinstance(tool.get("function"), dict) and tool["function"].get("strict") for tool in self.offered_tools)
        parallel = self.parallel_tool_calls is not False
        try:
            return tool_grammar(self.offered_tools, choice, parallel=parallel, mode="strict" if is_strict else "lenient")
        except UserError as error:
            raise bad_request(str(error), param="tool_choice" if str(error).startswith("tool_choice") else "tools") from None

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with, None for the rest of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_alternatives(self) -> int | None:
        """How many alternatives to return for each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
