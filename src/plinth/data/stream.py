"""The virtual stream: documents end to end in an order of their own in each epoch, epoch after epoch, cut in rows without a gap.

Documents change places in two steps: blocks of BLOCK neighbours among each other, then the documents of a block. So no table is longer
than the number of blocks, and any place of any epoch is found in the same time. The rows of each stretch of about one epoch are dealt
in a new order, so that the rows of a batch come from all over the corpus.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from plinth.data.order import permutation, permute
from plinth.data.rows import Pieces
from plinth.data.shards import BLOCK, Split, read_part

BLOCKS_AT_HAND = 256  # blocks whose order is kept: 100 KB each


class _Block(NamedTuple):
    """A block's documents in the order of an epoch."""

    documents: np.ndarray
    positions: np.ndarray
    """where each starts in the split, tokens"""
    ends: np.ndarray
    """where each ends in the block's stretch of the stream, tokens"""


class Stream:
    """The virtual stream over the documents of one kind of a split, or of all; without end."""

    def __init__(self, split: Split, kind: int | None, *key: int):
        self._split, self._kind, self._key = split, kind, key
        self._block_tokens = split.block_tokens if kind is None else split.kind_tokens[:, kind]
        self.num_tokens = int(self._block_tokens.sum())  # of one epoch
        self._blocks_of_epoch = lru_cache(maxsize=3)(self._order_of_blocks)
        self._block = lru_cache(maxsize=BLOCKS_AT_HAND)(self._order_in_block)

    def rows_an_epoch(self, seq_len: int) -> float:
        """Return how many rows show every token once."""
        return self.num_tokens / seq_len

    def pieces(self, rows: np.ndarray, seq_len: int) -> Pieces:
        """Return the dealt rows of these numbers, each of exactly `seq_len` tokens.

        Rows are dealt within stretches of as many whole rows as an epoch has, at least one.
        """
        rows_a_deal = max(1, self.num_tokens // seq_len)
        deals = rows // rows_a_deal
        dealt = np.empty(len(rows), dtype=np.int64)
        for deal in np.unique(deals):
            here = deals == deal
            dealt[here] = deal * rows_a_deal + permute(rows[here] - deal * rows_a_deal, rows_a_deal, *self._key, 2, int(deal))
        found = [self.stretch(int(row) * seq_len, seq_len) for row in dealt]
        first = np.concatenate([[0], np.cumsum([len(columns[0]) for columns in found])])
        return Pieces(first, *(np.concatenate(column) for column in zip(*found)))

    def stretch(self, start: int, num_tokens: int) -> tuple[np.ndarray, ...]:
        """Return (document, start, position, length) of the pieces from a place of the stream on."""
        parts = []
        while num_tokens:
            part = self._stretch_of_block(start, num_tokens)
            parts.append(part)
            taken = int(part[3].sum())
            start, num_tokens = start + taken, num_tokens - taken
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(column) for column in zip(*parts))

    def _stretch_of_block(self, start: int, num_tokens: int) -> tuple[np.ndarray, ...]:
        """Return the pieces as far as the block goes that holds `start`."""
        epoch, start = divmod(start, self.num_tokens)
        blocks, block_ends = self._blocks_of_epoch(epoch)
        place = int(block_ends.searchsorted(start, side="right"))
        start -= int(block_ends[place - 1]) if place else 0
        block = self._block(epoch, int(blocks[place]))
        first = int(block.ends.searchsorted(start, side="right"))
        last = int(block.ends.searchsorted(start + num_tokens, side="left"))
        stops = np.minimum(block.ends[first : last + 1], start + num_tokens)
        lengths = np.diff(stops, prepend=start)
        starts = np.zeros(len(stops), dtype=np.int64)
        starts[0] = start - (int(block.ends[first - 1]) if first else 0)
        return block.documents[first : last + 1], starts, block.positions[first : last + 1] + starts, lengths

    def _order_of_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._block_tokens), *self._key, 1, epoch)
        return order, np.cumsum(self._block_tokens[order])

    def _order_in_block(self, epoch: int, block: int) -> _Block:
        documents, offsets = documents_of_block(self._split, block, self._kind)
        order = permutation(len(documents), *self._key, 1, epoch, block)
        return _Block(documents[order], offsets[0][order], np.cumsum((offsets[1] - offsets[0])[order]))


def documents_of_block(split: Split, block: int, kind: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents of one kind in a block, and where each starts and ends in the split, shape (2, documents)."""
    start = block * BLOCK
    offsets = read_part(split.offsets, start, start + BLOCK + 1)
    spans = np.stack([offsets[:-1], offsets[1:]])
    documents = np.arange(start, start + spans.shape[1])
    if kind is None:
        return documents, spans
    wanted = read_part(split.kinds, start, start + BLOCK) == kind
    return documents[wanted], spans[:, wanted]
