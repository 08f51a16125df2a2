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

BLOCKS_AT_HAND = 512  # blocks whose order is kept: 64 KB each


class _Block(NamedTuple):
    """A block's documents in the order of an epoch."""

    documents: np.ndarray
    positions: np.ndarray
    """where each starts in the split, tokens"""
    begins: np.ndarray
    """where each begins in the block's stretch of the stream, tokens"""
    ends: np.ndarray
    """where each ends in it"""


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
        return self.stretches(dealt * seq_len, seq_len)

    def stretches(self, starts: np.ndarray, num_tokens: int) -> Pieces:
        """Return the pieces of `num_tokens` of the stream from each of these places on, a row each."""
        found = [np.empty((5, 0), dtype=np.int64)]
        rows, left = np.arange(len(starts)), np.full(len(starts), num_tokens)
        while len(rows):  # each time round, every row goes on to the end of its block
            epochs, places = np.divmod(starts, self.num_tokens)
            taken = np.empty_like(left)
            for epoch in np.unique(epochs).tolist():
                blocks, block_ends = self._blocks_of_epoch(epoch)
                of_epoch = np.flatnonzero(epochs == epoch)
                ranks = block_ends.searchsorted(places[of_epoch], side="right")
                for rank in np.unique(ranks).tolist():
                    here = of_epoch[ranks == rank]
                    begin = int(block_ends[rank - 1]) if rank else 0
                    taken[here] = np.minimum(left[here], block_ends[rank] - places[here])
                    block = self._block(epoch, int(blocks[rank]))
                    found.append(_pieces_of_block(block, rows[here], places[here] - begin, taken[here]))
            going = taken < left
            starts, rows, left = (starts + taken)[going], rows[going], (left - taken)[going]
        row, *columns = np.concatenate(found, axis=1)
        order = np.argsort(row, kind="stable")
        first = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
        return Pieces(first, *(column[order] for column in columns))

    def _order_of_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._block_tokens), *self._key, 1, epoch)
        return order, np.cumsum(self._block_tokens[order])

    def _order_in_block(self, epoch: int, block: int) -> _Block:
        documents, offsets = documents_of_block(self._split, block, self._kind)
        order = permutation(len(documents), *self._key, 1, epoch, block)
        lengths = (offsets[1] - offsets[0])[order]
        ends = np.cumsum(lengths)
        return _Block(documents[order], offsets[0][order], ends - lengths, ends)


def _pieces_of_block(block: _Block, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return row, document, start, position and length of the pieces of some stretches of a block, shape (5, pieces)."""
    first = block.ends.searchsorted(starts, side="right")
    counts = block.ends.searchsorted(starts + lengths, side="left") - first + 1
    index = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    begins = np.maximum(block.begins[index], np.repeat(starts, counts))
    stops = np.minimum(block.ends[index], np.repeat(starts + lengths, counts))
    offsets = begins - block.begins[index]
    return np.stack([np.repeat(rows, counts), block.documents[index], offsets, block.positions[index] + offsets, stops - begins])


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
