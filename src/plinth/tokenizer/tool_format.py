"""How tools, calls of them and their results stand in a conversation's text.

A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call> and a result stands between <tool_response> tags in a user's
turn, as Hermes and Qwen models have them. The tags are plain text, so every tokenizer has them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from plinth.config import UserError, nearest

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESPONSE_START, RESPONSE_END = "<tool_response>\n", "\n</tool_response>"
THINK, THOUGHT = "<think>", "</think>"
TOOLS_INTRODUCTION = "# Tools\n\nYou can call the functions that these signatures describe:\n<tools>"
TOOLS_INSTRUCTION = (
    "</tools>\n\nTo call one, answer with its name and its arguments as JSON between tags, once for each call:\n"
    f'{CALL_START}\n{{"name": "<name>", "arguments": {{<arguments>}}}}\n{CALL_END}'
)

Tool = dict[str, Any]


def check_tools(tools: Any) -> None:
    """Raise UserError unless `tools` is a list of {type: function, function: {name, description, parameters}} with names of their own."""
    if not isinstance(tools, list) or not tools:
        raise UserError("tools is not a list with at least one tool.")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise UserError(f'tools[{i}] is not of the form {{"type": "function", "function": {{"name": ...}}}}.')
        function = tool["function"]
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"tools[{i}].function.name={name!r} is not 1 to 64 letters, digits, _ and -.")
        if name in seen:
            raise UserError(f"tools[{i}].function.name={name!r} stands there twice. Give each tool its own name.")
        seen.add(name)
        for key, kind, what in (("description", str, "a text"), ("parameters", dict, "a JSON Schema object")):
            if not isinstance(function.get(key, kind()), kind):
                raise UserError(f"tools[{i}].function.{key} is not {what}.")


def check_tool_calls(calls: Any, where: str) -> None:
    """Raise UserError unless `calls` is a list of {type: function, function: {name, arguments}} whose arguments are a JSON object."""
    if not isinstance(calls, list) or not calls:
        raise UserError(f"{where} is not a list with at least one call.")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UserError(f'{where}[{i}] is not of the form {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}.')
        for key in ("name", "arguments"):
            if key not in function:
                raise UserError(f"{where}[{i}].function has no {key!r}.{nearest(key, function)}")
        if not isinstance(function["name"], str) or not isinstance(_arguments(function["arguments"]), dict):
            raise UserError(f"{where}[{i}].function is not a name and arguments that are a JSON object.")


def _arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return None


def plain_calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls whose arguments are objects, where the wire format has JSON text."""
    plain = ({"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])} for call in calls)
    return [{"type": "function", "function": function} for function in plain]


def tools_text(tools: list[Tool]) -> str:
    """Return what the system's turn says of tools."""
    return "\n".join([TOOLS_INTRODUCTION, *(json.dumps(tool, ensure_ascii=False) for tool in tools), TOOLS_INSTRUCTION])


def with_reasoning(content: str, reasoning: str) -> str:
    """Return an answer's text with what was thought before it, as reasoning models write that."""
    return f"{THINK}\n{reasoning.strip()}\n{THOUGHT}\n\n{content}"


def answer_text(content: str, calls: list[dict[str, Any]]) -> str:
    """Return the text of an assistant's turn: what it says, then its calls."""
    written = [f"{CALL_START}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CALL_END}" for call in plain_calls(calls)]
    return "\n".join([content, *written] if content else written)
