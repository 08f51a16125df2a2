"""Examples to learn from, whatever file they came from: conversations, pairs, rankings, labelled answers, problems with a check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from plinth.tokenizer.chat import Message

Kind = Literal["text", "messages", "preference", "ranking", "unpaired", "verifiable"]
KINDS: tuple[Kind, ...] = ("text", "messages", "preference", "ranking", "unpaired", "verifiable")
SHOWN = 3


@dataclass(frozen=True)
class TextRow:
    """A plain text."""

    text: str
    """every token of it is learnt"""


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the assistant's are learnt."""

    messages: list[Message]
    """{role, content}, and tool_calls or weight where given; an assistant's message of weight 0 is not learnt"""
    tools: list[dict[str, Any]] | None = None
    """functions that the assistant may call, as in OpenAI's requests"""


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected continuation."""

    prompt: list[Message]
    """messages before the answer"""
    chosen: list[Message]
    """the better continuation, which begins with the assistant's message"""
    rejected: list[Message]
    """the worse continuation"""
    margin: float | None = None
    """by how much it is better, where the file says so"""
    tools: list[dict[str, Any]] | None = None
    """functions that the assistant may call"""
    probability: float | None = None
    """how likely it is better, where the file says so: a label of several judges, or of a model"""


@dataclass(frozen=True)
class Ranking:
    """A prompt with several continuations in order of preference."""

    prompt: list[Message]
    """messages before the answer"""
    completions: list[list[Message]]
    """the continuations, as they stand in the file"""
    ranks: tuple[int, ...]
    """of each its rank: 0 is best, equal ranks are ties"""


@dataclass(frozen=True)
class Unpaired:
    """A prompt with one continuation that is wanted or not."""

    prompt: list[Message]
    """messages before the answer"""
    completion: list[Message]
    """the continuation"""
    label: bool
    """whether it is wanted"""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, and what its answer is checked by where the file says so; with an answer it is a row of kind verifiable."""

    messages: list[Message]
    """the conversation before the answer"""
    answer: str | None = None
    """what the check compares with; JSON text where the file holds a list or an object"""
    verifier: str | None = None
    """name of the check"""

    @property
    def text(self) -> str:
        """The last message's text."""
        return str(self.messages[-1]["content"])


Row = TextRow | Conversation | Preference | Ranking | Unpaired | Prompt


@dataclass(frozen=True)
class Examples:
    """A file's rows, all of one kind, with what was recognised, left out and left unread."""

    kind: Kind
    """what the rows are"""
    rows: list[Any]
    """normalised rows: TextRow, Conversation, Preference, Ranking, Unpaired or Prompt, as the kind says"""
    numbers: list[int]
    """of each row its number in the file, from 1"""
    detected: dict[str, int]
    """format recognised -> rows of it"""
    rejected: list[tuple[int, str]] = field(default_factory=list)
    """(row number, reason) of every row left out"""
    unread: Mapping[str, int] = field(default_factory=dict)
    """field that nothing reads -> rows that have it"""

    def describe(self) -> str:
        """Return one line: what was recognised, how many rows are used, left out, and have fields that nothing reads."""
        formats = ", ".join(f"{name} ({rows_text(count)})" for name, count in self.detected.items())
        parts = [f"read as {self.kind}: {formats}; {rows_text(len(self.rows))} used"]
        if self.rejected:
            shown = "; ".join(f"row {number}: {reason}" for number, reason in self.rejected[:SHOWN])
            more = f"; and {len(self.rejected) - SHOWN} more" if len(self.rejected) > SHOWN else ""
            parts.append(f"{len(self.rejected)} rejected ({shown}{more})")
        if self.unread:
            parts.append("not read: " + ", ".join(f"{name} ({rows_text(count)})" for name, count in self.unread.items()))
        return "; ".join(parts)


def rows_text(count: int) -> str:
    """Return a number of rows in words."""
    return f"{count} row{'' if count == 1 else 's'}"


def convert(row: Row, kind: Kind) -> list[Row]:
    """Return a row as rows of another kind; an empty list when its kind cannot be read so.

    A pair gives its chosen conversation, or two labelled answers; a ranking its pairs of unequal rank; a problem its answer as the reply.
    """
    match (row, kind):
        case (Preference(), "messages"):
            return [Conversation([*unweighted(row.prompt), *row.chosen], row.tools)]
        case (Preference(), "unpaired"):
            return [Unpaired(row.prompt, row.chosen, True), Unpaired(row.prompt, row.rejected, False)]
        case (Ranking(), "preference"):
            ranked = list(zip(row.ranks, row.completions))
            return [Preference(row.prompt, better, worse) for a, better in ranked for b, worse in ranked if a < b]
        case (Prompt(), "messages"):
            return [Conversation([*unweighted(row.messages), {"role": "assistant", "content": row.answer}])]
    return []


def unweighted(messages: list[Message]) -> list[Message]:
    """Return the messages of a prompt with weight 0 for the assistant's, so that only what follows is learnt."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]
