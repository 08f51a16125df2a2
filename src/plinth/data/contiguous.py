"""Rows that go on where they stopped: text for models that carry their state from each step to the next.

The virtual stream of documents (see `data.stream`) is cut into as many long stretches as a batch has rows, and each step takes the next
`seq_len` tokens of every stretch. When the stretches are read, a new pass begins on the stream behind them, in a new order of documents.
Which tokens a step reads is a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.mixture import open_components
from plinth.data.rows import read_rows
from plinth.data.shards import read_manifest
from plinth.data.stream import Stream


class ContiguousRows(NamedTuple):
    """A step's rows, of R stretches."""

    inputs_RT: torch.Tensor
    """int64"""
    targets_RT: torch.Tensor
    """int64: the tokens after the inputs"""
    fresh_R: torch.Tensor
    """bool: the row does not go on from the step before"""


class _Part(NamedTuple):
    """The rows that one shards folder has."""

    stream: Stream
    split: Any
    first: int
    num_rows: int
    steps_a_pass: int


class ContiguousText:
    """Long stretches of the documents of one or more shards folders, side by side."""

    def __init__(self, shards: Path | Sequence[Path], num_rows: int, seq_len: int, seed: int, split: str = "train"):
        """Share the rows out by the folders' tokens, at least one each.

        Raises UserError for lengths below 1, an empty split, and fewer rows than folders.
        """
        if num_rows < 1 or seq_len < 1:
            raise UserError(f"rows={num_rows} and seq_len={seq_len} must both be at least 1.")
        folders = [Path(shards)] if isinstance(shards, (str, Path)) else [Path(folder) for folder in shards]
        components = open_components(folders, split, None, None)
        if num_rows < len(components):
            raise UserError(f"{num_rows} rows cannot hold {len(components)} shards folders side by side. Take as many rows as folders.")
        self.num_rows, self.seq_len, self.seed, self.split = num_rows, seq_len, seed, split
        self._folders, self._parts = folders, []
        first = 0
        for i, (component, count) in enumerate(zip(components, share_rows([part.share for part in components], num_rows))):
            stream = Stream(component.split, None, *((seed,) if len(components) == 1 else (seed, 3 + i)))
            self._parts.append(_Part(stream, component.split, first, count, max(1, stream.num_tokens // (count * seq_len))))
            first += count

    @property
    def num_tokens(self) -> int:
        return sum(part.stream.num_tokens for part in self._parts)

    @property
    def steps_a_pass(self) -> int:
        """Steps that read every folder at least once, but for less than a step's rest of it."""
        return max(part.steps_a_pass for part in self._parts)

    def rows(self, step: int) -> ContiguousRows:
        """Return the rows of a step, counted from 0."""
        block = np.empty((2, self.num_rows, self.seq_len), dtype=np.int64)
        fresh_R = np.zeros(self.num_rows, dtype=bool)
        for part in self._parts:
            number, place = divmod(step, part.steps_a_pass)
            stretches = number * part.num_rows + np.arange(part.num_rows)
            starts = (stretches * part.steps_a_pass + place) * self.seq_len
            where = slice(part.first, part.first + part.num_rows)
            block[:, where] = read_rows(part.split, part.stream.stretches(starts, self.seq_len), self.seq_len)[:2]
            fresh_R[where] = place == 0
        return ContiguousRows(torch.from_numpy(block[0]), torch.from_numpy(block[1]), torch.from_numpy(fresh_R))

    def epochs(self, steps: int) -> float:
        """Return how often the tokens have been read in so many steps, on average."""
        return steps * self.num_rows * self.seq_len / self.num_tokens

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the rows depend on, in JSON values."""
        return {
            "tokens": [read_manifest(folder).get("sha256") for folder in self._folders],
            "rows": [part.num_rows for part in self._parts],
            "seq_len": self.seq_len,
            "seed": self.seed,
        }


def share_rows(shares: Sequence[float], num_rows: int) -> list[int]:
    """Return how many of the rows each share gets: at least one, and the rest in proportion, by largest remainder."""
    exact = np.asarray(shares) / np.sum(shares) * (num_rows - len(shares))
    counts = np.floor(exact).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: num_rows - len(shares) - int(counts.sum())]] += 1
    return (counts + 1).tolist()
