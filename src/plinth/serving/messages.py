"""The messages of a conversation on the wire, and as the renderer takes them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from plinth.serving.errors import bad_request


class TextPart(BaseModel):
    """One part of a message's content; only text is known."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | list[TextPart] | None = None

    def plain(self, index: int) -> dict[str, str]:
        """Return {role, content} with content as one string. Raises ApiError for what we cannot render."""
        where = f"messages.{index}"
        role = "system" if self.role == "developer" else self.role
        if role not in ("system", "user", "assistant"):
            raise bad_request(f"{where}.role={self.role!r} is not supported. Use system, developer, user or assistant.", param=where)
        if self.content is None:
            raise bad_request(f"{where}.content is missing. Give a text.", param=f"{where}.content")
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise bad_request(f"{where}.content has a part of type {part.type!r}; only text is supported.", param=f"{where}.content")
        return {"role": role, "content": "".join(part.text or "" for part in self.content)}


def plain_messages(messages: list[Message]) -> list[dict[str, str]]:
    """Return a conversation as {role, content} dictionaries. Raises ApiError for what we cannot render."""
    return [message.plain(index) for index, message in enumerate(messages)]
