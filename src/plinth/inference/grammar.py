"""What a completion must be: a JSON document of a schema, a regular expression, one of several texts, a context-free grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from plinth.config import UserError
from plinth.inference.schema_form import check_schema, whole_numbers
from plinth.tokenizer.tool_format import CALL_END, CALL_START

Mode = Literal["strict", "lenient"]
Whitespace = Literal["bounded", "single", "none"]
# Bytes of one grammar. Larger ones hold their caller for a second and more, long before the compiler gives up.
MAX_SCHEMA_BYTES = 1 << 19
MAX_OTHER_BYTES = 1 << 15

# How white space between JSON's signs is bounded: a model that may write any amount of it writes it until max_tokens.
SPACING: dict[str, dict[str, Any]] = {
    "bounded": {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"},
    "single": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "none": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
}


@dataclass(frozen=True)
class Grammar:
    """What a completion must be. Make one with json_schema, json_object, regex, choice, lark or gbnf."""

    kind: Literal["json_schema", "regex", "choice", "lark", "tools"]
    """language that the source is written in"""
    source: str
    """JSON text of a schema, a regular expression, a JSON list of texts, a grammar in llguidance's dialect of Lark, or calls of tools"""
    mode: Mode = "strict"
    """'strict': a keyword that cannot be enforced is an error; 'lenient': it is ignored with a warning, the result is validated"""
    whitespace: Whitespace = "bounded"
    """between JSON's signs: 'bounded' up to 8 anywhere, 'single' one space behind comma and colon, 'none'"""

    def __post_init__(self) -> None:
        for name, value, choices in (("mode", self.mode, get_args(Mode)), ("whitespace", self.whitespace, get_args(Whitespace))):
            if value not in choices:
                raise UserError(f"{name}={value!r} is not one of {', '.join(choices)}.")
        _check_size(self.kind, self.source, MAX_SCHEMA_BYTES if self.has_schema or self.kind == "choice" else MAX_OTHER_BYTES)

    @classmethod
    def json_schema(cls, schema: Any, *, mode: Mode = "strict", whitespace: Whitespace = "bounded") -> Grammar:
        """A JSON document that a schema describes; `schema` is an object, a boolean, or either as JSON text.

        Raises UserError when it is no schema, or nested too deeply. Properties come in the schema's order.
        """
        schema = _parsed(schema)
        if schema is False:
            raise UserError("json_schema=false allows nothing. Use true for any JSON.")
        if not isinstance(schema, (dict, bool)):
            raise UserError(f"json_schema is of type {type(schema).__name__}, not an object or a boolean.")
        check_schema(schema)
        try:
            source = json.dumps(whole_numbers(schema), ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise UserError(f"json_schema is not JSON: {error}.") from None
        return cls("json_schema", source, mode, whitespace)

    @classmethod
    def json_object(cls, *, whitespace: Whitespace = "bounded") -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, whitespace=whitespace)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches from beginning to end; look-around and back-references do not exist."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of several texts. Raises UserError when there is none, or one is empty."""
        if isinstance(choices, str) or not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise UserError("choice is not a list of at least one text, none of them empty.")
        return cls("choice", json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar with the rule `start`, in llguidance's dialect of Lark."""
        return cls("lark", text)

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """A context-free grammar with the rule `root`, in llama.cpp's notation. Raises UserError where it is malformed."""
        _check_size("grammar", text, MAX_OTHER_BYTES)
        try:
            return cls.lark(gbnf_to_lark(text))
        except Exception as error:  # the importer raises an own class, and bare ones where its input is far off
            raise UserError(f"the GBNF grammar cannot be read: {short_message(str(error))}.") from None

    def compiled_source(self, lenient: bool) -> str:
        """Return what the compiler takes; `lenient` says whether keywords that it lacks are ignored."""
        options = {**SPACING[self.whitespace], "lenient": lenient, "coerce_one_of": lenient}
        if self.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema("{}" if self.source == "true" else self.source, overrides=options)
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.source)
        if self.kind == "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in json.loads(self.source)))
        if self.kind == "tools":
            return LLMatcher.grammar_from_lark(_tools_lark(json.loads(self.source), options))
        return LLMatcher.grammar_from_lark(self.source)

    @property
    def has_schema(self) -> bool:
        """Whether keywords of JSON Schema may be lacking, and documents may be closed in time."""
        return self.kind in ("json_schema", "tools")

    @property
    def is_json(self) -> bool:
        """Whether completions are JSON documents."""
        return self.kind == "json_schema"


def _check_size(name: str, text: str | bytes, limit: int) -> None:
    size = len(text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text)
    if size > limit:
        raise UserError(f"the {name} has {size} bytes; at most {limit} are compiled. Make it smaller.")


def _tools_lark(source: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the grammar of tool calls; see plinth.inference.tool_calls."""
    bodies = [f"%json {json.dumps({'x-guidance': options, **schema}, ensure_ascii=False)}" for schema in source["schemas"]]
    rules = [f"body_{i}: {body}" for i, body in enumerate(bodies)]
    body = f'"\\n" ({" | ".join(f"body_{i}" for i in range(len(bodies)))}) "\\n{CALL_END}"'
    if source["auto"]:
        start = f"start: (lead call){'*' if source['parallel'] else '?'} TEXT"
        return "\n".join([start, f'lead[lazy]: TEXT "{CALL_START}"', f"call: {body}", "TEXT: /(.|\\n)*/", *rules])
    more = '("\\n" call)*' if source["parallel"] else ""
    return "\n".join([f"start: call {more}", f'call: "{CALL_START}" {body}', *rules])


def _parsed(schema: Any) -> Any:
    if not isinstance(schema, (str, bytes)):
        return schema
    _check_size("json_schema", schema, MAX_SCHEMA_BYTES)
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UserError(f"json_schema is not JSON: {short_message(str(error))}.") from None


def short_message(message: str) -> str:
    """Return a library's message on one line, without its dump of states."""
    line = " ".join(message.split("<state>")[0].split("<backtrace>")[0].split())
    return (line if len(line) <= 300 else line[:300] + " ...").rstrip(". ")
