"""Batches of examples of unequal length: one a row, padded on the right, or several whole ones in a row, each in a segment of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from plinth.data.buckets import UNCOUNTED, padded_width
from plinth.tokenizer.chat import Rendered


def pad_rows(tokens: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (inputs (B, T), targets (B, T)): each row shifted by one, padded on the right, uncounted targets -1.

    T is the longest row's length minus one, rounded up to a multiple of WIDTH_STEP. With causal attention, padding on the right
    changes nothing before it.
    """
    width = padded_width(max(len(row) for row in tokens) - 1)
    inputs = torch.full((len(tokens), width), pad_id)
    targets = torch.full((len(tokens), width), UNCOUNTED)
    for i, (row, mask) in enumerate(zip(tokens, masks)):
        ids = torch.as_tensor(row)
        inputs[i, : len(row) - 1] = ids[:-1]
        targets[i, : len(row) - 1] = torch.where(torch.as_tensor(mask)[1:], ids[1:], UNCOUNTED)
    return inputs, targets


def pack_rows(rows: Sequence[Sequence[Rendered]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (inputs, targets, segments), each (B, T), of rows that hold several examples each.

    With segments, attention keeps to each example and positions restart in it; no example's last token is read, and none's first is a
    target. Padding, on the right, is a segment of its own. T is as in `pad_rows`.
    """
    filled = [sum(len(each.tokens) - 1 for each in row) for row in rows]
    shape = (len(rows), padded_width(max(filled)))
    inputs, targets, segments = torch.full(shape, pad_id), torch.full(shape, UNCOUNTED), torch.full(shape, -1)
    for i, row in enumerate(rows):
        place = 0
        for number, each in enumerate(row):
            ids, mask = torch.as_tensor(each.tokens), torch.as_tensor(each.loss_mask)
            here = slice(place, place + len(ids) - 1)
            inputs[i, here], segments[i, here] = ids[:-1], number
            targets[i, here] = torch.where(mask[1:], ids[1:], UNCOUNTED)
            place = here.stop
    return inputs, targets, segments


def describe_examples(kind: str, step_examples: Sequence[int], rows: Sequence[int] | None, text: Callable[[int], str]) -> str:
    """Name the examples in some rows of a step's batch, or in all of it, each with how its text begins."""
    chosen = [step_examples[row] for row in rows] if rows else list(step_examples)
    shown = [f"{kind} {index} ({text(index)[:60]!r})" for index in chosen[:3]]
    more = [f"{kind}s " + ", ".join(str(index) for index in chosen[3:])] if chosen[3:] else []
    return "; ".join(shown + more)
