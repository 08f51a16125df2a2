"""Answers to prompts in order of preference, as a reward model learns from them: all answers of a prompt in one element."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plinth.config import UserError
from plinth.data.buckets import padded_width
from plinth.data.rejects import row_counts
from plinth.ops.shared_rows import share_rows
from plinth.posttraining.examples import Examples, Preference, Ranking
from plinth.posttraining.formats import read_examples
from plinth.posttraining.masks import render_row
from plinth.posttraining.reward_config import TooLong
from plinth.tokenizer.chat import Message
from plinth.tokenizer.encode import Tokenizer


@dataclass(frozen=True)
class Choice:
    """A prompt with answers that somebody put in order."""

    prompt: list[Message]
    """messages before the answers"""
    answers: list[list[Message]]
    """the answers; of a pair the chosen one first"""
    ranks: tuple[int, ...]
    """of each its rank: 0 is best, equal ranks are ties"""
    rows: list[list[int]]
    """of each its conversation's tokens, the prompt's first"""
    margin: float = 0.0
    """by how much the first of a pair is better; 0 for rankings"""
    probability: float = 1.0
    """how likely the first of a pair is better; 1 for rankings"""
    number: int = 0
    """row of the file, from 1"""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in self.rows)

    @property
    def together(self) -> int:
        """Tokens of all rows when what they begin with stands once."""
        return sum(map(len, self.rows)) - (len(self.rows) - 1) * shared_tokens(self.rows)

    @property
    def prompt_key(self) -> str:
        """What two choices of the same prompt have in common."""
        return json.dumps([[message["role"], message.get("content")] for message in self.prompt], ensure_ascii=False)

    def answer_texts(self) -> list[str]:
        """Return the answers as plain text."""
        return ["\n".join(message.get("content") or "" for message in answer) for answer in self.answers]


@dataclass
class Choices:
    """The choices of a file, and what became of those that are too long."""

    choices: list[Choice]
    """in the file's order"""
    examples: Examples
    """what was read"""
    cut: list[int] = field(default_factory=list)
    """row numbers whose prompt lost its beginning"""
    too_long: list[int] = field(default_factory=list)
    """row numbers left out as too long"""
    alike: list[int] = field(default_factory=list)
    """row numbers left out since all their answers are the same, so that no order of them can be learnt"""

    def describe_left(self, limit: int) -> str:
        """Return what was done about rows that are too long or have nothing to tell apart; empty when there were none."""
        parts = [f"{len(self.cut)} prompts lost their beginning (row {_first(self.cut)})"] if self.cut else []
        parts += [f"{len(self.too_long)} left out (row {_first(self.too_long)})"] if self.too_long else []
        said = [f"longer than {limit} tokens: {', '.join(parts)}"] if parts else []
        return "; ".join(said + ([f"answers all the same: {len(self.alike)} left out (row {_first(self.alike)})"] if self.alike else []))

    def counts(self) -> dict[str, int]:
        """Return what the run's summary says of the data."""
        return row_counts(len(self.examples.rejected), too_long=len(self.too_long), cut=len(self.cut), unusable=len(self.alike))


def _first(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")


def read_choices(path: Path, tokenizer: Tokenizer, limit: int, too_long: TooLong = "leave_out") -> Choices:
    """Read pairs or rankings in any format of formats.FORMATS; rows longer than `limit` tokens are cut or left out, and counted.

    Rows whose answers are all the same are left out and counted too.

    Cutting takes tokens from the prompt's beginning, as many of every answer's row; where that would reach the answers, the row is
    left out. Raises UserError when the file holds neither pairs nor rankings, or none is left.
    """
    examples = read_examples(path)
    if examples.kind not in ("preference", "ranking"):
        examples = read_examples(path, "preference")
    found = Choices([], examples)
    for number, row in zip(examples.numbers, examples.rows):
        choice = make_choice(row, tokenizer, number)
        if all(tokens == choice.rows[0] for tokens in choice.rows):
            found.alike.append(number)
            continue
        over = choice.longest - limit
        if over > 0 and (too_long == "leave_out" or over >= shared_tokens(choice.rows)):
            found.too_long.append(number)
            continue
        if over > 0:
            found.cut.append(number)
            choice = Choice(**{**vars(choice), "rows": [tokens[over:] for tokens in choice.rows]})
        found.choices.append(choice)
    if not found.choices:
        way = "A model with a longer context, or too_long=cut_start, takes long rows."
        raise UserError(f"{path}: no row is left; {found.describe_left(limit)}. {way}")
    return found


def make_choice(row: Any, tokenizer: Tokenizer, number: int = 0) -> Choice:
    """Return a Preference or a Ranking with its tokens."""
    rows = [part.rendered.tokens for part in render_row(tokenizer, row)]
    if isinstance(row, Ranking):
        return Choice(row.prompt, row.completions, row.ranks, rows, number=number)
    assert isinstance(row, Preference)
    probability = 1.0 if row.probability is None else row.probability
    return Choice(row.prompt, [row.chosen, row.rejected], (0, 1), rows, row.margin or 0.0, probability, number)


def shared_tokens(rows: Sequence[list[int]]) -> int:
    """Return how many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def split_tail(choices: Sequence[Choice], share: float) -> tuple[list[Choice], list[Choice]]:
    """Return the choices but the last ones, and the last `share` of them, held out."""
    kept = len(choices) - round(share * len(choices))
    return list(choices[:kept]), list(choices[kept:])


def repeated_prompts(training: Sequence[Choice], held_out: Sequence[Choice]) -> int:
    """Return how many held-out choices have a prompt that is trained on."""
    seen = {choice.prompt_key for choice in training}
    return sum(choice.prompt_key in seen for choice in held_out)


Batch = tuple[torch.Tensor, ...]


def batch_of(choices: Sequence[Choice], pad_id: int, places: int | None = None) -> Batch:
    """Return a micro-batch in which a prompt stands once, however many its answers. With `places` no more are used than a model has.

    Tokens (P, L), the three tensors of SharedRows, then lengths (P, G), ranks (P, G), margins (P,) and probabilities (P,). G is the largest
    number of answers; an absent one has rank -1, and the prompt alone in its place.
    """
    count = max(len(choice.rows) for choice in choices)
    shared = [shared_tokens(choice.rows) for choice in choices]
    rows = [choice.rows + [choice.rows[0][: max(1, common)]] * (count - len(choice.rows)) for choice, common in zip(choices, shared)]
    width = padded_width(max(choice.longest for choice in choices) + 1)  # the last place is for padding
    width = width if places is None else min(width, places)
    length = padded_width(max(sum(map(len, each)) - (count - 1) * common for each, common in zip(rows, shared)) + 1)
    lie, tokens_PL = share_rows(rows, shared, length, width, pad_id)
    ranks = torch.tensor([[*choice.ranks, *[-1] * (count - len(choice.rows))] for choice in choices])
    return (
        tokens_PL, lie.places_BRT, lie.homes_BL, lie.shared_B, torch.tensor([[len(row) for row in each] for each in rows]), ranks,
        torch.tensor([choice.margin for choice in choices]), torch.tensor([choice.probability for choice in choices]),
    )  # fmt: skip
