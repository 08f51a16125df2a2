"""Batches of examples of unequal length: like lengths together, padded on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from plinth.data.buckets import UNCOUNTED, padded_width


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


def describe_examples(kind: str, step_examples: Sequence[int], rows: Sequence[int] | None, text: Callable[[int], str]) -> str:
    """Name the examples in some rows of a step's batch, or in all of it, each with how its text begins."""
    chosen = [step_examples[row] for row in rows] if rows else list(step_examples)
    shown = [f"{kind} {index} ({text(index)[:60]!r})" for index in chosen[:3]]
    more = [f"{kind}s " + ", ".join(str(index) for index in chosen[3:])] if chosen[3:] else []
    return "; ".join(shown + more)
