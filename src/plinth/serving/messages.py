"""The messages of a conversation on the wire, and as the renderer takes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from plinth.serving.errors import bad_request


class TextPart(BaseModel):
    """One part of a message's content; only text is known."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None


class CalledFunction(BaseModel):
    """What a call of a tool calls."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str


class ToolCallPart(BaseModel):
    """A call of a tool that the assistant made earlier."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCallPart] | None = None
    tool_call_id: str | None = None
    """the call that a tool's message answers; the format goes by the order"""

    def plain(self, index: int) -> dict[str, Any]:
        """Return {role, content}, content as one string, and tool_calls if any. Raises ApiError for what we cannot render."""
        where = f"messages.{index}"
        role = "system" if self.role == "developer" else self.role
        if role not in ("system", "user", "assistant", "tool"):
            raise bad_request(f"{where}.role={self.role!r} is not supported. Use system, developer, user, assistant or tool.", param=where)
        calls = {"tool_calls": [call.model_dump(exclude={"id"}) for call in self.tool_calls]} if self.tool_calls else {}
        if self.content is None and not calls:
            raise bad_request(f"{where}.content is missing. Give a text.", param=f"{where}.content")
        return {"role": role, "content": self._text(where), **calls}

    def _text(self, where: str) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise bad_request(f"{where}.content has a part of type {part.type!r}; only text is supported.", param=f"{where}.content")
        return "".join(part.text or "" for part in self.content)


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Return a conversation as the renderer takes it. Raises ApiError for what we cannot render."""
    return [message.plain(index) for index, message in enumerate(messages)]
