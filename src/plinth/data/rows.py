"""Rows of training tokens as lists of pieces of documents, and their reading from the shards.

A row is described by what it predicts: each piece is a stretch of target tokens of one document. The input of a target is the token
before it; before a document's first token stands <|endoftext|>, with which the document ends. So over all pieces of an epoch each
token is once an input and once a target, however the documents are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plinth.data.shards import Split

IGNORE = -100  # a target that no loss counts, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Pieces:
    """The pieces of some rows, in order; int64 columns."""

    first: np.ndarray
    """shape (rows + 1,): row i has the pieces first[i]..first[i + 1]"""
    document: np.ndarray
    """index of the document in its split"""
    start: np.ndarray
    """where the piece starts in its document, tokens"""
    position: np.ndarray
    """where it starts in the split, tokens"""
    length: np.ndarray
    """tokens, at least 1"""

    @property
    def num_rows(self) -> int:
        return len(self.first) - 1

    def take(self, rows: np.ndarray) -> Pieces:
        """Return the pieces of the given rows, in their order."""
        counts = self.first[rows + 1] - self.first[rows]
        first = np.concatenate([[0], np.cumsum(counts)])
        index = np.arange(first[-1]) + np.repeat(self.first[rows] - first[:-1], counts)
        return Pieces(first, self.document[index], self.start[index], self.position[index], self.length[index])


def read_rows(split: Split, pieces: Pieces, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs, targets and segments, int64, each of shape (rows, seq_len).

    A position's segment is the number of its piece in the row. Behind the last piece of a row there is padding: targets are IGNORE
    there, and the segment is one of its own.
    """
    lengths, rows = pieces.length, pieces.num_rows
    counts = np.diff(pieces.first)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    index = np.arange(ends[-1]) + np.repeat(pieces.position - begins, lengths)
    read = split.tokens[index].astype(np.int64)
    before = np.roll(read, 1)  # right but for each piece's first token
    end_of_text = split.tokens[split.offsets[1] - 1]
    before[begins] = np.where(pieces.start > 0, split.tokens[pieces.position - 1], end_of_text)
    segment = np.arange(len(lengths)) - np.repeat(pieces.first[:-1], counts)
    filled_R = np.add.reduceat(lengths, pieces.first[:-1])
    if (filled_R == seq_len).all():
        return before.reshape(rows, seq_len), read.reshape(rows, seq_len), np.repeat(segment, lengths).reshape(rows, seq_len)
    inputs, targets = np.full((rows, seq_len), int(end_of_text)), np.full((rows, seq_len), IGNORE)
    segments = np.repeat(counts, seq_len).reshape(rows, seq_len)
    used_RT = np.arange(seq_len) < filled_R[:, None]
    inputs[used_RT], targets[used_RT], segments[used_RT] = before, read, np.repeat(segment, lengths)
    return inputs, targets, segments
