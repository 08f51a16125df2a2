"""Several documents in one row: where each position stands in its own, and what it may look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Runs:
    """The segments of packed rows as stretches of the batch's tokens, row after row, for attention that takes one at a time."""

    lengths: tuple[int, ...]
    """tokens of each, padding included; they add up to B T"""


def segment_runs(segments_BT: torch.Tensor) -> Runs:
    """Return the runs of equal numbers; one ends where its row does."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = begins_BT.flatten().nonzero()[:, 0]
    return Runs(tuple(torch.diff(starts, append=starts.new_tensor([segments_BT.numel()])).tolist()))


def positions_in_segments(segments_BT: torch.Tensor) -> torch.Tensor:
    """Return each position's place in its segment, counted from 0, shape (B, T); a segment is a run of equal numbers."""
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places_T - torch.where(begins_BT, places_T, 0).cummax(1).values


def segment_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """Return a mask that is True where a query may look: at its own segment, up to itself; bool, shape (B, 1, T, T)."""
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT.tril_()[:, None]


def window_mask(length: int, window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a mask that is True where a query may look: at itself and the `window` - 1 positions before; bool, shape (T, T)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)
