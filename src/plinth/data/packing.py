"""Best-fit packing: documents into rows so that only those are cut that are longer than a row, and nothing is dropped.

Of a document longer than a row, whole rows are cut off from its start; what remains, and every shorter document, goes into the row with
the least room that still holds it, the longest first (best fit decreasing). Rows end with padding where nothing fits.

Source: Ding et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830.
Differs: rooms are handled in groups of equal size, so that the work beside sorting grows with the lengths that occur, not with their
product with the documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np

from plinth.data.order import keyed_hash, permute
from plinth.data.rows import Pieces
from plinth.data.shards import READ_DOCUMENTS, Split, read_part


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each piece; int64, rows numbered from 0.

    `lengths` must fall, and lie between 1 and `capacity`. Each piece goes where, of all rows that still hold it, the least room is.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}  # room left -> rows with that room
    rooms: list[int] = []  # its keys, rising
    num_rows, done = 0, 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist()):
        end = done + count
        while done < end:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms.pop(place)
                group = np.concatenate(open_rows.pop(room))
            else:
                room = capacity
                group = np.arange(num_rows, num_rows + -(-(end - done) // (capacity // length)))
                num_rows += len(group)
            each = room // length  # pieces that a row of the group takes, one after the other
            placed = min(end - done, each * len(group))
            rows[done : done + placed] = np.repeat(group, each)[:placed]
            done += placed
            full, partly = divmod(placed, each)
            _put(open_rows, rooms, room - each * length, group[:full])
            if partly:
                _put(open_rows, rooms, room - partly * length, group[full : full + 1])
            _put(open_rows, rooms, room, group[full + bool(partly) :])
    return rows


def _put(open_rows: dict[int, list[np.ndarray]], rooms: list[int], room: int, rows: np.ndarray) -> None:
    if room and len(rows):
        if room not in open_rows:
            open_rows[room] = []
            insort(rooms, room)
        open_rows[room].append(rows)


class Packed:
    """The documents of one kind of a split, or of all, packed into rows by best fit; epoch after epoch, without end.

    Every epoch has the same number of rows. Which documents of equal length change places, and the order of the rows, follow from the
    epoch. The plan of an epoch takes 32 bytes a piece, and some 100 while it is made; two are kept.
    """

    def __init__(self, split: Split, kind: int | None, *key: int):
        self._split, self._kind, self._key = split, kind, key
        self.num_tokens = int((split.block_tokens if kind is None else split.kind_tokens[:, kind]).sum())  # of one epoch
        self._fit = lru_cache(maxsize=2)(self._rows_by_rank)
        self._plan = lru_cache(maxsize=2)(self._plan_of_epoch)

    def rows_an_epoch(self, seq_len: int) -> int:
        """Return how many rows show every token once."""
        return self._fit(seq_len)[1]

    def pieces(self, rows: np.ndarray, seq_len: int) -> Pieces:
        """Return the rows of these numbers."""
        rows_an_epoch = self.rows_an_epoch(seq_len)
        epochs = rows // rows_an_epoch
        order = np.argsort(epochs, kind="stable")
        parts = []
        for epoch in np.unique(epochs).tolist():
            places = rows[epochs == epoch] - epoch * rows_an_epoch
            parts.append(self._plan(seq_len, epoch).take(permute(places, rows_an_epoch, *self._key, 2, epoch)))
        if len(parts) == 1:
            return parts[0]
        first = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.first) for part in parts]))])
        columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("document", "start", "position", "length"))
        return Pieces(first, *columns).take(np.argsort(order, kind="stable"))

    def _columns(self) -> tuple[np.ndarray, ...]:
        """Return the documents, where each starts in the split, and its tokens."""
        parts = []
        for start in range(0, self._split.num_documents, READ_DOCUMENTS):
            stop = min(start + READ_DOCUMENTS, self._split.num_documents)
            offsets = read_part(self._split.offsets, start, stop + 1)
            columns = (np.arange(start, stop), offsets[:-1], np.diff(offsets))
            if self._kind is not None:
                wanted = read_part(self._split.kinds, start, stop) == self._kind
                columns = tuple(column[wanted] for column in columns)
            parts.append(columns)
        return tuple(np.concatenate(column) for column in zip(*parts))

    def _rows_by_rank(self, seq_len: int) -> tuple[np.ndarray, int]:
        """Return the row of each remainder, the longest first, behind the rows that are one piece, and how many rows there are."""
        _, _, lengths = self._columns()
        num_whole = int((lengths // seq_len).sum())
        rest = lengths % seq_len
        rows = num_whole + best_fit_decreasing(np.sort(rest[rest > 0])[::-1], seq_len)
        return rows, int(rows.max()) + 1 if len(rows) else num_whole

    def _plan_of_epoch(self, seq_len: int, epoch: int) -> Pieces:
        documents, positions, lengths = self._columns()
        whole, rest = lengths // seq_len, lengths % seq_len
        row_of_rest, num_rows = self._fit(seq_len)
        cut = np.repeat(np.arange(len(documents)), whole)
        cut_start = (np.arange(len(cut)) - np.repeat(np.cumsum(whole) - whole, whole)) * seq_len
        ranked = np.flatnonzero(rest)
        chance = keyed_hash(documents[ranked], *self._key, 1, epoch)
        ranked = ranked[np.lexsort((chance, -rest[ranked]))]
        row = np.concatenate([np.arange(len(cut)), row_of_rest])
        index, start = np.concatenate([cut, ranked]), np.concatenate([cut_start, whole[ranked] * seq_len])
        length = np.concatenate([np.full(len(cut), seq_len), rest[ranked]])
        chance = keyed_hash(documents[index], *self._key, 3, epoch)
        order = np.lexsort((chance, row))
        first = np.searchsorted(row[order], np.arange(num_rows + 1))
        index, start = index[order], start[order]
        return Pieces(first, documents[index], start, positions[index] + start, length[order])
