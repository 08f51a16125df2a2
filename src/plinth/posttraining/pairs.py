"""Pairs of answers as tokens: rendered with their masks, what cannot be learnt left out by row number, and put into batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from plinth.config import UserError
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.examples import Examples, Preference
from plinth.posttraining.masks import render_row
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer

LeftOut = list[tuple[int, str]]


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer, rendered."""

    chosen: Rendered
    """the prompt with the better answer"""
    rejected: Rendered
    """the prompt with the worse answer"""
    margin: float | None = None
    """by how much it is better, where the file says so"""
    probability: float | None = None
    """how likely it is better, where the file says so"""


def render_pairs(tokenizer: Tokenizer, found: Examples, max_seq_len: int) -> tuple[list[Pair], LeftOut]:
    """Return the pairs that can be learnt, and (row number, reason) of each that cannot.

    Left out are pairs of which a side has more tokens than the model reads, none of the answer's own, or the other side's: a pair is
    never cut.
    """
    pairs: list[Pair] = []
    left_out: LeftOut = []
    for number, row in zip(found.numbers, found.rows):
        try:
            pairs.append(render_pair(tokenizer, row, max_seq_len))
        except UserError as error:
            left_out.append((number, str(error).rstrip(".")))
    return pairs, left_out


def render_pair(tokenizer: Tokenizer, row: Preference, max_seq_len: int) -> Pair:
    """Render a pair. Raises UserError when it cannot be learnt."""
    parts = render_row(tokenizer, row)
    for part in parts:
        check_learnable(part.rendered, part.name, max_seq_len)
    chosen, rejected = (part.rendered for part in parts)
    if chosen.tokens == rejected.tokens:
        raise UserError("chosen and rejected are the same")
    return Pair(chosen, rejected, row.margin, row.probability)


def check_learnable(rendered: Rendered, name: str, max_seq_len: int) -> None:
    """Raise UserError for a sequence that is longer than the model reads or of which nothing is learnt."""
    if len(rendered.tokens) > max_seq_len + 1:  # the last token is predicted, not read
        raise UserError(f"{name} has {len(rendered.tokens)} tokens, more than max_seq_len={max_seq_len}")
    if not any(rendered.loss_mask):
        raise UserError(f"{name} has no token that is learnt")


def pad_sides(sides: Iterable[Sequence[Rendered]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of examples with R sequences each, (B, R, T); see pad_rows."""
    examples = [list(example) for example in sides]
    rows = [row for example in examples for row in example]
    inputs, targets = pad_rows([row.tokens for row in rows], [row.loss_mask for row in rows], pad_id)
    return inputs.unflatten(0, (len(examples), -1)), targets.unflatten(0, (len(examples), -1))
