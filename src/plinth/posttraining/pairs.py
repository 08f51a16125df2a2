"""Pairs of answers as tokens: rendered with their masks, what cannot be learnt left out by row number, and put into batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from plinth.config import UserError
from plinth.data.buckets import UNCOUNTED, padded_width
from plinth.ops.shared_rows import SharedRows, share_rows
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.examples import Examples, Preference
from plinth.posttraining.masks import render_row
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer


class LeftRow(NamedTuple):
    """A row of a file that was read but is not learnt."""

    number: int
    """in the file, from 1"""
    reason: str
    """why, without a full stop"""
    is_too_long: bool
    """whether it has more tokens than the model reads"""


class TooLongError(UserError):
    """A sequence has more tokens than the model reads."""


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


def render_pairs(tokenizer: Tokenizer, found: Examples, max_seq_len: int) -> tuple[list[Pair], list[LeftRow]]:
    """Return the pairs that can be learnt, and the rows that cannot.

    Left out are pairs of which a side has more tokens than the model reads, none of the answer's own, or the other side's: a pair is
    never cut.
    """
    pairs: list[Pair] = []
    left_out: list[LeftRow] = []
    for number, row in zip(found.numbers, found.rows):
        try:
            pairs.append(render_pair(tokenizer, row, max_seq_len))
        except UserError as error:
            left_out.append(left_row(number, error))
    return pairs, left_out


def left_row(number: int, error: UserError) -> LeftRow:
    """Return a row that an error keeps from being learnt."""
    return LeftRow(number, str(error).rstrip("."), isinstance(error, TooLongError))


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
        raise TooLongError(f"{name} has {len(rendered.tokens)} tokens, more than max_seq_len={max_seq_len}")
    if not any(rendered.loss_mask):
        raise UserError(f"{name} has no token that is learnt")


def pad_sides(sides: Iterable[Sequence[Rendered]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of examples with R sequences each, (B, R, T); see pad_rows."""
    examples = [list(example) for example in sides]
    rows = [row for example in examples for row in example]
    inputs, targets = pad_rows([row.tokens for row in rows], [row.loss_mask for row in rows], pad_id)
    return inputs.unflatten(0, (len(examples), -1)), targets.unflatten(0, (len(examples), -1))


SharedBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""inputs (B, L), targets (B, L) and the three tensors of SharedRows, with a row each, so that a batch can be cut to any of its rows"""
SHARED_PARTS = 5


def shared_tokens(sides: Sequence[Rendered]) -> int:
    """Return how many inputs the sequences begin with in common before the first one from which a token is learnt."""
    limit = min(min(len(side.tokens), side.loss_mask.index(True)) for side in sides) - 1
    first = sides[0].tokens
    others = [side.tokens for side in sides[1:]]
    if limit > 0 and all(other[:limit] == first[:limit] for other in others):
        return limit
    return next((i for i in range(limit) if any(other[i] != first[i] for other in others)), max(limit, 0))


def row_tokens(sides: Sequence[Rendered]) -> int:
    """Return the tokens of sequences as inputs when what they share stands once."""
    return sum(len(side.tokens) - 1 for side in sides) - (len(sides) - 1) * shared_tokens(sides)


def share_sides(examples: Sequence[Sequence[Rendered]], pad_id: int) -> SharedBatch:
    """Return examples with R sequences each as rows in which what they begin with stands once.

    The input from which a sequence's first learnt token is predicted is its own, so that each input of a row has one target.
    """
    shared = [shared_tokens(sides) for sides in examples]
    inputs = [[side.tokens[:-1] for side in sides] for sides in examples]
    length = padded_width(max(row_tokens(sides) for sides in examples) + 1)
    width = padded_width(max(len(row) for rows in inputs for row in rows) + 1)
    rows, tokens_BL = share_rows(inputs, shared, length, width, pad_id)
    targets_BRT = torch.full(rows.places_BRT.shape, UNCOUNTED)
    for b, sides in enumerate(examples):
        for r, side in enumerate(sides):
            ids, mask = torch.as_tensor(side.tokens), torch.as_tensor(side.loss_mask)
            targets_BRT[b, r, : len(ids) - 1] = torch.where(mask, ids, UNCOUNTED)[1:]
    return tokens_BL, targets_BRT.flatten(1).gather(1, rows.homes_BL), rows.places_BRT, rows.homes_BL, rows.shared_B


def shared_rows_of(batch: SharedBatch) -> SharedRows:
    """Return how a batch's sequences lie in its rows."""
    return SharedRows(*batch[2:])
