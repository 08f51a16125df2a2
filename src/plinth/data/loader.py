"""Batches from token shards, each a pure function of (seed, step), and windows over the held-out documents.

The virtual stream: in every epoch the documents in a new order, end to end; epoch follows epoch without a gap. It is cut in rows of
`seq_len` tokens, and the rows of each stretch of about one epoch are dealt in a new order, so that the rows of a batch come from
all over the corpus. Nothing is dropped or padded: an epoch's tokens are each an input once and a target once.
Orders come from sorting hashes, not from a generator, so they are the same with every version of every library.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plinth.config import UserError, nearest
from plinth.data.shards import Split, open_split

IGNORE = -100  # a target that no loss counts, as in torch.nn.functional.cross_entropy
QUOTA_ROWS = 1024  # rows over which the shares of the kinds are exact

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: np.ndarray) -> np.ndarray:
    """Return a bijective scramble of 64-bit numbers. Source: Steele et al. 2014 (SplitMix64), its output function."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """Return an order of 0..n-1 that depends on the integers of `key` only; int64, shape (n,)."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix64(state + _GOLDEN + np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return np.argsort(mix64(np.arange(n, dtype=np.uint64) * _GOLDEN + state), kind="stable")


class Stream:
    """The virtual token stream over some documents of a split, without end."""

    def __init__(self, split: Split, documents: np.ndarray, *key: int):
        self._split, self._documents, self._key = split, documents, key
        self._lengths = np.diff(split.offsets)[documents]
        self.num_tokens = int(self._lengths.sum())  # of one epoch
        self._epoch = lru_cache(maxsize=3)(self._order_of_epoch)
        self._deal = lru_cache(maxsize=3)(self._order_of_rows)

    def tokens(self, start: int, n: int) -> np.ndarray:
        """Return the `n` ids from position `start` on; int64, shape (n,)."""
        out = np.empty(n, dtype=np.int64)
        filled = 0
        while filled < n:
            epoch, position = divmod(start + filled, self.num_tokens)
            filled += self._copy(epoch, position, out[filled:])
        return out

    def row(self, index: int, seq_len: int) -> np.ndarray:
        """Return the dealt row `index` with the token behind it; int64, shape (seq_len + 1,).

        Rows are dealt within stretches of as many whole rows as an epoch has, at least one.
        """
        rows_a_deal = max(1, self.num_tokens // seq_len)
        deal, position = divmod(index, rows_a_deal)
        row = deal * rows_a_deal + int(self._deal(deal, rows_a_deal)[position])
        return self.tokens(row * seq_len, seq_len + 1)

    def _copy(self, epoch: int, position: int, out: np.ndarray) -> int:
        """Fill `out` from a position of one epoch on, at most to the epoch's end; return how many tokens were copied."""
        documents, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        filled = 0
        while filled < len(out) and place < len(documents):
            stop = int(self._split.offsets[documents[place] + 1])
            first = stop - int(ends[place] - position)
            piece = self._split.tokens[first : min(stop, first + len(out) - filled)]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            position += len(piece)
            place += 1
        return filled

    def _order_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._documents), *self._key, 1, epoch)
        return self._documents[order], np.cumsum(self._lengths[order])

    def _order_of_rows(self, deal: int, rows: int) -> np.ndarray:
        return permutation(rows, *self._key, 2, deal)


class TokenLoader:
    """Rows of tokens for training; every method is a pure function of its arguments and the seed."""

    def __init__(
        self,
        shards: Path,
        seq_len: int,
        sequences_per_step: int,
        seed: int,
        split: str = "train",
        weights: dict[str, float] | None = None,
    ):
        """Open a split of a shards folder.

        With `weights` {kind: share} the rows of each 1,024 hold the kinds in these shares (scaled to sum 1, exact to 1/1024), every
        kind with epochs of its own; each kind of the split must be named, and 0 leaves it out. Without, documents of all kinds
        share one stream. Raises UserError for lengths below 1, an empty split, and weights that name other kinds.
        """
        if seq_len < 1 or sequences_per_step < 1:
            raise UserError(f"seq_len={seq_len} and sequences_per_step={sequences_per_step} must both be at least 1.")
        self.split = open_split(shards, split)
        if self.split.num_tokens == 0:
            raise UserError(f"{shards} has no tokens in its {split} split. Curate more text.")
        self.seq_len, self.sequences_per_step, self.seed = seq_len, sequences_per_step, seed
        self.num_tokens = self.split.num_tokens
        if weights is None:
            self.kinds, self._quotas = ["all"], np.array([QUOTA_ROWS])
            self._streams = [Stream(self.split, np.arange(self.split.num_documents), seed)]
        else:
            self.kinds, self._quotas = _quotas(weights, self.split)
            self._streams = [
                Stream(self.split, np.flatnonzero(self.split.kinds == self.split.kind_names.index(kind)), seed, 3 + i)
                for i, kind in enumerate(self.kinds)
            ]
        self._schedule = lru_cache(maxsize=2)(self._kinds_of_rows)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs_BT, targets_BT) of a step: int64, B sequences_per_step, T seq_len; targets are the next tokens."""
        return self.rows(step * self.sequences_per_step, self.sequences_per_step)

    def rows(self, first: int, num_rows: int, seq_len: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets) of `num_rows` dealt rows from row `first` on, int64, shape (num_rows, seq_len).

        Rows of another `seq_len` than the loader's count from 0 in that length: after the tokens of n steps of one length, go on
        in another at first = tokens seen / seq_len.
        """
        seq_len = seq_len or self.seq_len
        block = np.stack([self._row(index, seq_len) for index in range(first, first + num_rows)])
        rows = torch.from_numpy(block)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def tokens(self, start: int, n: int) -> np.ndarray:
        """Return `n` ids of the virtual stream from position `start` on, in document order of its epoch; int64.

        Raises ValueError for a loader with weights, which has a stream a kind; see `rows`.
        """
        if len(self._streams) != 1:
            raise ValueError("a loader with weights has one stream a kind; use rows().")
        return self._streams[0].tokens(start, n)

    def epochs(self, step: int) -> float:
        """Return how often the split's tokens have been seen before `step`."""
        return step * self.sequences_per_step * self.seq_len / self.num_tokens

    def epochs_by_kind(self, step: int) -> dict[str, float]:
        """Return how often each kind's tokens have been seen before `step`, by the shares asked for."""
        tokens = step * self.sequences_per_step * self.seq_len
        return {
            kind: tokens * int(quota) / QUOTA_ROWS / stream.num_tokens
            for kind, quota, stream in zip(self.kinds, self._quotas, self._streams)
        }

    def _row(self, index: int, seq_len: int) -> np.ndarray:
        if len(self._streams) == 1:
            return self._streams[0].row(index, seq_len)
        group, place = divmod(index, QUOTA_ROWS)
        kinds, ranks = self._schedule(group)
        kind = int(kinds[place])
        return self._streams[kind].row(group * int(self._quotas[kind]) + int(ranks[place]), seq_len)

    def _kinds_of_rows(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the kind of each row of a group of QUOTA_ROWS, and which of its kind's rows in the group it is."""
        kinds = np.repeat(np.arange(len(self._quotas)), self._quotas)[permutation(QUOTA_ROWS, self.seed, 4, group)]
        ranks = np.empty(QUOTA_ROWS, dtype=np.int64)
        for kind, quota in enumerate(self._quotas):
            ranks[kinds == kind] = np.arange(quota)
        return kinds, ranks


def _quotas(weights: dict[str, float], split: Split) -> tuple[list[str], np.ndarray]:
    """Return the kinds with a share and their rows of QUOTA_ROWS, by largest remainder, at least one each."""
    present = sorted(split.kind_names[number] for number in np.unique(split.kinds))
    for kind in weights:
        if kind not in present:
            raise UserError(f"weights names {kind}, but the kinds of these shards are {', '.join(present)}.{nearest(kind, present)}")
    if missing := [kind for kind in present if kind not in weights]:
        raise UserError(f"weights leaves out {', '.join(missing)}. Give each kind a share; 0 leaves its text unread.")
    if any(not 0 <= weight < float("inf") for weight in weights.values()) or not sum(weights.values()) > 0:
        raise UserError(f"weights={weights} must be numbers from 0 up, and one of them above 0.")
    kinds = [kind for kind in present if weights[kind] > 0]
    shares = np.array([weights[kind] for kind in kinds]) / sum(weights.values()) * QUOTA_ROWS
    quotas = np.maximum(1, np.floor(shares).astype(np.int64))
    while quotas.sum() != QUOTA_ROWS:
        short = quotas.sum() < QUOTA_ROWS
        quotas[int(np.argmax((shares - quotas) if short else np.where(quotas > 1, quotas - shares, -np.inf)))] += 1 if short else -1
    return kinds, quotas


class HeldoutWindow(NamedTuple):
    """A stretch of one held-out document; unpack it as (document, inputs, targets, num_bytes, num_chars)."""

    document: int
    """index of the document in the split"""
    inputs: np.ndarray
    """ids, int64, at most seq_len of them"""
    targets: np.ndarray
    """the next ids, IGNORE where an earlier window has scored them"""
    num_bytes: int
    """of the whole document's text at its first window, 0 at the others: the sum over windows is the text's"""
    num_chars: int
    """likewise, characters"""


def heldout_windows(shards: Path, seq_len: int, stride: int | None = None, split: str = "heldout") -> Iterator[HeldoutWindow]:
    """Yield windows in which each token of each held-out document is a target exactly once.

    A document stands alone: its first token is predicted from <|endoftext|>, as in training, and its own <|endoftext|> is no
    target, for it has no bytes. Windows move on by `stride` tokens (default seq_len, no overlap); with a smaller one, each later
    window begins with seq_len - stride tokens of context.
    """
    stride = stride or seq_len
    if not 1 <= stride <= seq_len:
        raise UserError(f"stride={stride} must be between 1 and seq_len={seq_len}.")
    opened = open_split(shards, split)
    for index in range(opened.num_documents):
        ids = opened.document(index).astype(np.int64)
        ids = np.concatenate([ids[-1:], ids[:-1]])  # <|endoftext|> first
        begin, scored = 0, 1
        while scored < len(ids):
            stop = min(begin + seq_len + 1, len(ids))
            targets = ids[begin + 1 : stop].copy()
            targets[: scored - begin - 1] = IGNORE
            first = scored == 1
            yield HeldoutWindow(
                index, ids[begin : stop - 1], targets, int(opened.num_bytes[index]) * first, int(opened.num_chars[index]) * first
            )
            scored, begin = stop, begin + stride
