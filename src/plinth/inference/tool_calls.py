"""Tool calls in a model's text: the grammar that makes them well-formed, and the one parser that reads them.

The format is that of Hermes and Qwen models: <tool_call>, JSON with name and arguments, </tool_call>.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError, nearest
from plinth.inference.grammar import Grammar, Mode
from plinth.inference.json_validity import SchemaChecker
from plinth.tokenizer.tool_format import CALL_END, CALL_START, Tool, check_tools

SPACE = " \t\r\n"


@dataclass(frozen=True)
class ToolCall:
    """One call that a model made."""

    id: str
    """name of this call, which its result refers to"""
    name: str
    """the tool"""
    arguments: str
    """a JSON object as text"""

    def message(self) -> dict[str, Any]:
        """Return it as an entry of a message's tool_calls."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def new_call_id() -> str:
    """Return an id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


def tool_grammar(tools: Sequence[Tool], choice: str = "required", *, parallel: bool = True, mode: Mode = "strict") -> Grammar:
    """Return the grammar of an answer that may or must call tools.

    choice: 'auto' (text, calls, or both; what begins like a call must be one), 'required' (calls only, at least one), or a tool's
    name (that one). parallel: whether more than one call may come. Arguments follow each tool's schema; mode as for schemas.
    Raises UserError for malformed tools and for a choice that is none of them.
    """
    check_tools(list(tools))
    names = [tool["function"]["name"] for tool in tools]
    if choice not in ("auto", "required", *names):
        raise UserError(f"tool_choice={choice!r} is not auto, required or one of the tools {', '.join(names)}.{nearest(choice, names)}")
    chosen = [tool["function"] for tool in tools if choice in ("auto", "required") or tool["function"]["name"] == choice]
    schemas = [_call_schema(function) for function in chosen]
    for schema in schemas:
        Grammar.json_schema(schema)  # says what is wrong with it
    source = {"schemas": schemas, "auto": choice == "auto", "parallel": parallel}
    return Grammar("tools", json.dumps(source, ensure_ascii=False), mode, "single")


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    parameters = dict(function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False})
    parameters.setdefault("type", "object")
    shared = {key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters}  # references start at the root
    properties = {"name": {"const": function["name"]}, "arguments": parameters}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False, **shared}


class ToolCallParser:
    """Reads an answer piece by piece; however it is cut, the text and the calls are the same.

    Text is given out as soon as it can be no part of a call; a call when it is complete. What looks like a call but is none (not
    JSON, no name, a name not among `names`) stays text. White space around calls belongs to neither.
    """

    def __init__(self, names: Collection[str] | None = None, new_id: Callable[[], str] = new_call_id):
        self._names = names
        self._new_id = new_id
        self._held = ""
        self._scan: _ObjectScan | None = None  # while within a call
        self._after_call = False
        self.num_calls = 0
        """calls that were given out"""

    def push(self, text: str) -> list[str | ToolCall]:
        """Take a piece and return the texts and calls that are certain now, in order."""
        found: list[str | ToolCall] = []
        self._held += text
        while self._step(found):
            pass
        return _joined(found)

    def flush(self) -> list[str | ToolCall]:
        """End the answer and return what was held back; a call that is not complete is text."""
        rest, self._held = self._held, ""
        if self._after_call and not self._scan:
            rest = rest.lstrip(SPACE)
        self._scan = None
        return [rest] if rest else []

    def _step(self, found: list[str | ToolCall]) -> bool:
        return self._read_call(found) if self._scan is not None else self._read_text(found)

    def _read_text(self, found: list[str | ToolCall]) -> bool:
        if self._after_call:
            self._held = self._held.lstrip(SPACE)
            if CALL_END.startswith(self._held):  # that the call's end tag may still come includes that nothing has come
                if self._held == CALL_END:
                    self._held = ""
                return False
            if self._held.startswith(CALL_END):
                self._held = self._held[len(CALL_END) :]
                return True
        at = self._held.find(CALL_START)
        if at >= 0:
            self._give(found, self._held[:at].rstrip(SPACE))
            self._held = self._held[len(self._held[:at].rstrip(SPACE)) :]
            self._scan = _ObjectScan(self._held.index(CALL_START) + len(CALL_START))
            return True
        keep = _uncertain(self._held)
        self._give(found, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _give(self, found: list[str | ToolCall], text: str) -> None:
        if text:
            found.append(text)
            self._after_call = False

    def _read_call(self, found: list[str | ToolCall]) -> bool:
        """Read on in a call; the text up to its JSON's end stays held until it is known to be one."""
        assert self._scan is not None
        state = self._scan.push(self._held)
        if state is None:
            return False
        call = self._call(self._held[self._scan.start : self._scan.end]) if state else None
        if call is None:  # no call: its tag is text, and what follows is looked at again
            start = self._held.index(CALL_START) + len(CALL_START)
            self._give(found, self._held[:start])
            self._held = self._held[start:]
        else:
            found.append(call)
            self.num_calls += 1
            self._held = self._held[self._scan.end :]
            self._after_call = True
        self._scan = None
        return True

    def _call(self, text: str) -> ToolCall | None:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name, arguments = call.get("name"), call.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict) or (self._names is not None and name not in self._names):
            return None
        return ToolCall(self._new_id(), name, json.dumps(arguments, ensure_ascii=False))


class _ObjectScan:
    """Finds the end of a JSON object that begins, behind white space, at a place of a text that grows."""

    def __init__(self, start: int):
        self.start = start
        self.end = start
        self._depth = 0
        self._inside = False
        self._escaped = False

    def push(self, text: str) -> bool | None:
        """Return True when the object is complete, False when there is none, None while it goes on."""
        while self.end < len(text):
            sign = text[self.end]
            self.end += 1
            if self._escaped:
                self._escaped = False
            elif self._inside:
                self._inside, self._escaped = sign != '"', sign == "\\"
            elif sign == '"' and self._depth:
                self._inside = True
            elif sign in "{[" and (self._depth or sign == "{"):
                self._depth += 1
            elif sign in "}]" and self._depth:
                self._depth -= 1
                if self._depth == 0:
                    return True
            elif self._depth == 0 and sign not in SPACE:
                return False
        return None


def _uncertain(text: str) -> int:
    """Return how many characters at the end may belong to a call: white space, and the beginning of its tag behind it."""
    tag = next((length for length in range(min(len(CALL_START) - 1, len(text)), 0, -1) if text.endswith(CALL_START[:length])), 0)
    body = text[: len(text) - tag]
    return tag + len(body) - len(body.rstrip(SPACE))


def _joined(found: list[str | ToolCall]) -> list[str | ToolCall]:
    joined: list[str | ToolCall] = []
    for item in found:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


def parse_answer(text: str, names: Collection[str] | None = None, new_id: Callable[[], str] = new_call_id) -> tuple[str, list[ToolCall]]:
    """Return an answer's text without its calls, and the calls."""
    parser = ToolCallParser(names, new_id)
    found = parser.push(text) + parser.flush()
    return "".join(item for item in found if isinstance(item, str)), [item for item in found if isinstance(item, ToolCall)]


def why_call_invalid(call: ToolCall, tools: Sequence[Tool]) -> str | None:
    """Return what is wrong with a call, or None when one of the tools takes it."""
    tool = next((tool["function"] for tool in tools if tool["function"]["name"] == call.name), None)
    if tool is None:
        return f"there is no tool {call.name!r}"
    return SchemaChecker(tool.get("parameters") or {"type": "object"}).why_invalid(call.arguments)
