"""The assistant's turn as it grows: its text and its calls of tools, the same whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plinth.inference.tool_calls import ToolCall, ToolCallParser


class Turn:
    """One answer of a chat. `tool_names` are the tools that may be called, None for text only."""

    def __init__(self, tool_names: list[str] | None):
        self._parser = None if tool_names is None else ToolCallParser(tool_names)
        self._calls: list[ToolCall] = []
        self._content = ""
        self.text = ""
        """all that the model wrote, the calls as it wrote them"""
        self.finish_reason: str | None = None
        """'stop', 'length', or 'tool_calls' for an answer that ended by itself with calls"""

    def push(self, text: str, reason: str | None) -> Iterator[dict[str, Any]]:
        """Take a piece, the last one with the reason of the end; yield what it adds as deltas of the wire."""
        self.text += text
        for item in self._read(text, reason is not None):
            if isinstance(item, str):
                self._content += item
                yield {"content": item}
            else:
                yield {"tool_calls": [{"index": len(self._calls), **item.message()}]}
                self._calls.append(item)
        if reason is not None:
            self.finish_reason = "tool_calls" if self._calls and reason == "stop" else reason

    def _read(self, text: str, is_last: bool) -> list[str | ToolCall]:
        if self._parser is None:
            return [text] if text else []
        return self._parser.push(text) + (self._parser.flush() if is_last else [])

    def message(self) -> dict[str, Any]:
        """Return the whole answer as a message."""
        content = self._content if self._content or not self._calls else None
        said = {"role": "assistant", "content": content, "refusal": None}
        return said | ({"tool_calls": [call.message() for call in self._calls]} if self._calls else {})
