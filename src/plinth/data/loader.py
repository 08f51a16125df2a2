"""Batches from token shards, each a pure function of (seed, step).

Rows come from one or more components (shards folders, or kinds of document in them) in exact shares; each component's rows are a
virtual stream or documents packed by best fit, with epochs of their own. Nothing is dropped: over an epoch each token of a component is
an input once and a target once. Finding a step's rows takes the same time and memory at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.mixture import MANY_EPOCHS, Account, Schedule, open_components
from plinth.data.packing import Packed
from plinth.data.rows import Pieces, read_rows
from plinth.data.shards import read_manifest
from plinth.data.stream import Stream

Packing = Literal["stream", "best_fit"]
PACKINGS: dict[str, type[Stream] | type[Packed]] = {"stream": Stream, "best_fit": Packed}


class Piece(NamedTuple):
    """A stretch of a document that a row predicts."""

    shards: str
    """the shards folder"""
    kind: str
    """of the document"""
    document: int
    """its index in the split"""
    start: int
    """first token of the stretch, counted from 0 in the document"""
    length: int
    """tokens"""

    @property
    def name(self) -> str:
        return f"document {self.document} ({self.kind}) of {self.shards}, tokens {self.start}-{self.start + self.length - 1}"


class TokenLoader:
    """Rows of tokens for training; every method is a pure function of its arguments and the seed."""

    def __init__(
        self,
        shards: Path | Sequence[Path],
        seq_len: int,
        sequences_per_step: int,
        seed: int,
        split: str = "train",
        *,
        kind_weights: dict[str, float] | None = None,
        shard_weights: Sequence[float] | None = None,
        packing: Packing = "stream",
        mask_documents: bool = False,
    ):
        """Open a split of one or more shards folders.

        Shares of folders and kinds: see `open_components`; of each 1,024 rows each component has its share, exact to 1/1024. `packing`
        is "stream" (documents end to end, cut at the ends of rows, no padding) or "best_fit" (only documents longer than a row are
        cut, a little padding). With `mask_documents` batches carry segments, by which attention keeps to the document.
        Raises UserError for lengths below 1, an unknown packing, an empty split, and weights that do not fit the shards.
        """
        if seq_len < 1 or sequences_per_step < 1:
            raise UserError(f"seq_len={seq_len} and sequences_per_step={sequences_per_step} must both be at least 1.")
        if packing not in PACKINGS:
            raise UserError(f"packing={packing!r} is not one of {', '.join(PACKINGS)}.")
        folders = [Path(shards)] if isinstance(shards, (str, Path)) else [Path(folder) for folder in shards]
        self.components = open_components(folders, split, kind_weights, shard_weights)
        self.seq_len, self.sequences_per_step, self.seed = seq_len, sequences_per_step, seed
        self.packing, self.mask_documents = packing, mask_documents
        self._schedule = Schedule(self.components, seed)
        keys = [(seed,)] if len(self.components) == 1 else [(seed, 3 + i) for i in range(len(self.components))]
        self._sources = [PACKINGS[packing](part.split, part.kind, *key) for part, key in zip(self.components, keys)]
        self.num_tokens = sum(source.num_tokens for source in self._sources)

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> tuple[torch.Tensor, ...]:
        """Return a rank's share of the rows of a step, as `rows` does; the shares of all ranks joined in order are the whole batch."""
        first, stop = (self.sequences_per_step * edge // num_ranks for edge in (rank, rank + 1))
        return self.rows(step * self.sequences_per_step + first, stop - first)

    def rows(self, first: int, num_rows: int, seq_len: int | None = None) -> tuple[torch.Tensor, ...]:
        """Return (inputs, targets) of rows from row `first` on, int64, shape (num_rows, seq_len); targets are the next tokens.

        Targets of padding are IGNORE. With document masking a third tensor follows, the segments: positions of a row with the same
        number belong to one document. Rows of another `seq_len` than the loader's count from 0 in that length: after the tokens of n
        steps of one length, go on in another at first = tokens seen / seq_len.
        """
        seq_len = seq_len or self.seq_len
        block = np.empty((3, num_rows, seq_len), dtype=np.int64)
        for where, component, pieces in self._pieces(first, num_rows, seq_len):
            block[:, where] = read_rows(self.components[component].split, pieces, seq_len)
        inputs, targets, segments = torch.from_numpy(block)
        return (inputs, targets, segments) if self.mask_documents else (inputs, targets)

    def documents(self, step: int, place: tuple[int, int, int] | None = None) -> list[list[Piece]]:
        """Return for each row of a step the pieces of documents that it predicts.

        `place` is (first row, number of rows, seq_len) where a schedule gives the step rows of its own.
        """
        place = place or (step * self.sequences_per_step, self.sequences_per_step, self.seq_len)
        rows: list[list[Piece]] = [[] for _ in range(place[1])]
        for where, component, pieces in self._pieces(*place):
            part = self.components[component]
            kinds = part.split.kinds[pieces.document].tolist()
            columns = (pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist())
            found = [Piece(str(part.shards), part.split.kind_names[kind], *rest) for kind, *rest in zip(kinds, *columns)]
            for row, begin, end in zip(where.tolist(), pieces.first[:-1].tolist(), pieces.first[1:].tolist()):
                rows[row] = found[begin:end]
        return rows

    def describe_batch(self, step: int, rows: Sequence[int] | None = None, place: tuple[int, int, int] | None = None) -> str:
        """Return a line for each row of a step, or for some, that names its documents, so that a batch can be looked at.

        `step` counts from 0 as everywhere here; the text counts updates from 1, as metrics.jsonl does. `place`: see `documents`.
        """
        found = self.documents(step, place)
        lines = []
        for row in range(len(found)) if rows is None else rows:
            lines.append(f"step {step + 1} row {row}: " + "; ".join(piece.name for piece in found[row]))
        return "\n".join(lines)

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the rows depend on, in JSON values: two loaders with the same give the same rows."""
        parts = [{"tokens": read_manifest(part.shards).get("sha256"), "kind": part.kind_name} for part in self.components]
        return {
            "components": parts,
            "quotas": self._schedule.quotas.tolist(),
            "packing": self.packing,
            "mask_documents": self.mask_documents,
            "seq_len": self.seq_len,
            "sequences_per_step": self.sequences_per_step,
            "seed": self.seed,
        }

    def epochs(self, step: int) -> float:
        """Return how often the tokens of the mixture have been read before `step`, on average."""
        rows = self._schedule.rows_before(step * self.sequences_per_step)
        read = sum(n / source.rows_an_epoch(self.seq_len) * source.num_tokens for n, source in zip(rows.tolist(), self._sources))
        return read / self.num_tokens

    def accounts(self, step: int) -> list[Account]:
        """Return what has been read of each component before `step`: unique and repeated tokens, to within one row."""
        result = []
        rows = self._schedule.rows_before(step * self.sequences_per_step)
        for n, part, source in zip(rows.tolist(), self.components, self._sources):
            epochs = n / source.rows_an_epoch(self.seq_len)
            read = round(epochs * source.num_tokens)
            unique = min(read, source.num_tokens)
            result.append(Account(str(part.shards), part.kind_name, source.num_tokens, unique, read - unique, epochs))
        return result

    def padding(self) -> float:
        """Return the share of positions that hold no token, over an epoch of the mixture's rows."""
        shares = self._schedule.quotas / self._schedule.quotas.sum()
        fill = [source.num_tokens / (source.rows_an_epoch(self.seq_len) * self.seq_len) for source in self._sources]
        return 1.0 - float(np.dot(shares, fill))

    def warnings(self, steps: int) -> list[str]:
        """Return a sentence for each component that `steps` steps would read more often than repetition helps."""
        return [
            f"{part.name} would be read {account.epochs:.1f} times. Up to about {MANY_EPOCHS:.0f} passes, repeated text is nearly as good "
            "as fresh (Muennighoff et al. 2023, arXiv:2305.16264); then its worth falls. Bring more text, or lower its share or the steps."
            for part, account in zip(self.components, self.accounts(steps))
            if account.epochs > MANY_EPOCHS
        ]

    def _pieces(self, first: int, num_rows: int, seq_len: int) -> list[tuple[np.ndarray, int, Pieces]]:
        """Return (which of the rows, component, their pieces) for each component that has any."""
        component, number = self._schedule.place(np.arange(first, first + num_rows))
        found = []
        for i in np.unique(component).tolist():
            where = np.flatnonzero(component == i)
            found.append((where, i, self._sources[i].pieces(number[where], seq_len)))
        return found
