"""Structured output on the wire: `response_format` as OpenAI has it, `structured_outputs` as vLLM has it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plinth.config import UserError
from plinth.inference.grammar import Grammar
from plinth.serving.errors import bad_request


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None
    """true: a keyword that cannot be enforced is refused; else it is ignored, and the finished document is validated"""


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("has json_schema with type 'json_schema', and with no other")
        return self

    def grammar(self) -> Grammar | None:
        """Return what the answer must be, None for any text. Raises ApiError."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Grammar.json_object()
        mode: Literal["strict", "lenient"] = "strict" if self.json_schema.strict else "lenient"
        schema = self.json_schema.schema_
        return made("response_format.json_schema", lambda: Grammar.json_schema(schema, mode=mode))


class StructuredOutputs(BaseModel):
    """`structured_outputs`: one of its fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: dict[str, Any] | bool | str | None = Field(default=None, alias="json")
    """a JSON Schema, as an object or as its text"""
    json_object: bool | None = None
    """true for any JSON object"""
    regex: str | None = None
    """a regular expression that the whole answer matches"""
    choice: list[str] | None = None
    """texts, one of which is the answer"""
    grammar_: str | None = Field(default=None, alias="grammar")
    """a context-free grammar, in Lark's notation or, with `::=`, in GBNF"""

    def grammar(self) -> Grammar:
        """Return what the answer must be. Raises ApiError unless it is one thing."""
        given = [name for name in ("json", "json_object", "regex", "choice", "grammar") if self._field(name) not in (None, False)]
        if len(given) != 1:
            has = ", ".join(given) or "none"
            raise bad_request(f"structured_outputs has {has}; give one of json, json_object, regex, choice, grammar.", "structured_outputs")
        return made(f"structured_outputs.{given[0]}", lambda: self._made(given[0]))

    def _field(self, name: str) -> Any:
        return getattr(self, {"json": "json_", "grammar": "grammar_"}.get(name, name))

    def _made(self, name: str) -> Grammar:
        value = self._field(name)
        if name == "json":
            return Grammar.json_schema(value)
        if name == "json_object":
            return Grammar.json_object()
        if name == "regex":
            return Grammar.regex(value)
        if name == "choice":
            return Grammar.choice(value)
        return Grammar.gbnf(value) if "::=" in value else Grammar.lark(value)


def made(param: str, make: Any) -> Grammar:
    """Return the grammar that `make` gives; its UserError becomes a 400 that names `param`."""
    try:
        return make()
    except UserError as error:
        raise bad_request(str(error), param=param) from None
