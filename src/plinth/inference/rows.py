"""From requests to the rows of one model call: which token goes where, and which rows attend alike.

A generated token is one row that attends alone; a prompt goes in chunks of PREFILL_CHUNK rows aligned to its start. Both,
and the window of the cache that a row reads, depend on the row's own position only. So its arithmetic is the same
whatever else is in the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from plinth.models.kv_cache import KVCache, Span
from plinth.ops.linear import pad_rows

PREFILL_CHUNK = 16
FILLER = 0  # token of rows that only fill a chunk or a tile; nothing reads what they give


@dataclass
class RowBatch:
    """The rows of one model call, in order: generated tokens, prompt chunks, filling."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add_decode(self, rows: Sequence[tuple[int, int, int]], cache: KVCache) -> list[int]:
        """Append one row each for (token, position, slot); return their row numbers in the order given."""
        order = sorted(range(len(rows)), key=lambda i: (cache.window(rows[i][1]), rows[i][2]))
        numbers = [0] * len(rows)
        for window, members in groupby(order, key=lambda i: cache.window(rows[i][1])):
            start = len(self)
            for i in members:
                numbers[i] = len(self)
                self._append(*rows[i])
            self.spans.append(Span(start, len(self), 1, window))
        return numbers

    def add_prefill(self, chunks: Sequence[tuple[list[int], int, int]], cache: KVCache) -> list[int]:
        """Append a chunk each for (tokens, first position, slot); return the number of each chunk's first row.

        A chunk shorter than PREFILL_CHUNK is filled up; the filling lands on later positions of its own slot, which are
        written again before anything reads them.
        """
        order = sorted(range(len(chunks)), key=lambda i: (cache.window(chunks[i][1] + PREFILL_CHUNK - 1), chunks[i][2]))
        numbers = [0] * len(chunks)
        for window, members in groupby(order, key=lambda i: cache.window(chunks[i][1] + PREFILL_CHUNK - 1)):
            start = len(self)
            for i in members:
                tokens, first, slot = chunks[i]
                numbers[i] = len(self)
                for offset in range(PREFILL_CHUNK):
                    self._append(tokens[offset] if offset < len(tokens) else FILLER, first + offset, slot)
            self.spans.append(Span(start, len(self), PREFILL_CHUNK, window))
        return numbers

    def _append(self, token: int, position: int, slot: int) -> None:
        self.tokens.append(token)
        self.positions.append(position)
        self.slots.append(slot)

    def tensors(self, scratch_slot: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens, positions and slots as int64 tensors, filled to whole tiles with rows in the scratch slot."""
        missing = pad_rows(len(self)) - len(self)
        columns = (self.tokens, FILLER), (self.positions, 0), (self.slots, scratch_slot)
        tensors = (torch.tensor(values + [filler] * missing, dtype=torch.int64) for values, filler in columns)
        return tuple(tensor.to(device) for tensor in tensors)  # type: ignore[return-value]


def chunk_starts(begin: int, end: int) -> range:
    """Return the first positions of the chunks that cover begin..end; `begin` is a multiple of PREFILL_CHUNK."""
    return range(begin, end, PREFILL_CHUNK)
