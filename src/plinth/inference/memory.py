"""What of a conversation the model still sees when it no longer fits the context; what was dropped is always said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError

Message = dict[str, Any]
SUMMARY = "What was said before, in short: "


@dataclass(frozen=True)
class Window:
    """What the model sees of a conversation."""

    messages: list[Message]
    """those that fit"""
    dropped: list[Message]
    """those that do not, oldest first"""
    num_tokens: int
    """of what fits, with the header of the answer"""


def fit_window(
    messages: list[Message],
    max_tokens: int,
    count_tokens: Callable[[list[Message]], int],
    summarise: Callable[[list[Message]], str] | None = None,
) -> Window:
    """Return the newest exchanges of a conversation that fit `max_tokens`, behind its system messages.

    An exchange is a user's message and all that follows up to the next, so that no answer or result of a tool stands without its
    question. count_tokens: of messages as they are rendered. summarise: makes a text of what is dropped, which stands as a system
    message in its place where it fits. Raises UserError when the system messages and the last exchange alone do not fit.
    """
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    system, said = messages[:start], messages[start:]
    num_tokens = 0
    for cut in (0, *(i for i, message in enumerate(said) if message["role"] == "user" and i)):
        kept = system + said[cut:]
        num_tokens = count_tokens(kept)
        if num_tokens <= max_tokens:
            window = Window(kept, said[:cut], num_tokens)
            return _with_summary(window, len(system), max_tokens, count_tokens, summarise) if cut and summarise else window
    raise UserError(f"the last message has {num_tokens} tokens with the system message; the context has room for {max_tokens}. Shorten it.")


def _with_summary(window: Window, place: int, max_tokens: int, count_tokens, summarise) -> Window:
    note = {"role": "system", "content": SUMMARY + summarise(window.dropped)}
    messages = [*window.messages[:place], note, *window.messages[place:]]
    num_tokens = count_tokens(messages)
    return Window(messages, window.dropped, num_tokens) if num_tokens <= max_tokens else window
