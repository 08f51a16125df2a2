"""Parallel text: sentences with their translations, as pairs of token rows and as padded batches."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import UNCOUNTED, padded_width
from plinth.tokenizer.encode import Tokenizer


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, gzip where its name ends in .gz, without their ends.

    Only line feeds end a line, so that a file's lines stay those of its translation whatever separators stand in the sentences.
    """
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if str(path).endswith(".gz") else content).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}). Convert it first.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def read_pairs(files: Sequence[Path]) -> tuple[list[Pair], int]:
    """Read files in pairs, source then target, line i of the one being line i of the other translated.

    Returns the pairs and how many were left out because a side is empty. Raises UserError when a file lacks its partner, two files
    have different numbers of lines, or nothing is left.
    """
    if not files or len(files) % 2:
        raise UserError(f"{len(files)} file(s) of parallel text: name them in pairs, a source and its translation.")
    pairs: list[Pair] = []
    empty = 0
    for source, target in zip(files[::2], files[1::2]):
        source_lines, target_lines = read_lines(source), read_lines(target)
        if len(source_lines) != len(target_lines):
            raise UserError(
                f"{source} has {len(source_lines)} lines and {target} {len(target_lines)}: line i of the one "
                "must be line i of the other translated. Align them first."
            )
        found = [Pair(*texts) for texts in zip(source_lines, target_lines) if all(text.strip() for text in texts)]
        empty += len(source_lines) - len(found)
        pairs += found
    if not pairs:
        raise UserError(f"{', '.join(map(str, files))}: no line has text on both sides.")
    return pairs, empty


@dataclass(frozen=True)
class Marks:
    """The ids that stand around a sentence."""

    pad_id: int
    """fills rows up"""
    start_id: int
    """what a decoder starts from"""
    end_id: int
    """behind each sentence, source and target"""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Marks:
        """Return those of a tokenizer of ours: padding starts a decoder, as in T5 and Marian. Raises UserError when it has none."""
        pad, end = tokenizer.pad_id, tokenizer.end_of_text_id
        if pad is None or end is None:
            raise UserError("the tokenizer has no <|pad|> and <|endoftext|>. Train one with `plinth tokenizer train`.")
        return cls(pad, pad, end)


class TokenRows:
    """Rows of tokens of unequal length in one array."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        self._ends = np.cumsum(self.lengths)
        self._tokens = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(self.lengths.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._tokens[self._ends[i] - self.lengths[i] : self._ends[i]]


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class ParallelText:
    """Tokenised pairs; `batch` pads some of them into tensors.

    A source is its tokens and an end; a decoder reads a start and the target's tokens, and predicts these and an end.
    """

    def __init__(
        self,
        pairs: Sequence[Pair | tuple[str, str]],
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
        *,
        source_marks: Marks | None = None,
        target_marks: Marks | None = None,
        max_seq_len: int | None = None,
    ):
        """Encode the pairs; one with a side of more than `max_seq_len` tokens, its end included, is left out and counted."""
        self.source_marks = source_marks or Marks.of(source_tokenizer)
        self.target_marks = target_marks or Marks.of(target_tokenizer)
        sources = [[*row, self.source_marks.end_id] for row in source_tokenizer.encode_batch(pair[0] for pair in pairs)]
        targets = [[*row, self.target_marks.end_id] for row in target_tokenizer.encode_batch(pair[1] for pair in pairs)]
        kept = [i for i in range(len(pairs)) if max_seq_len is None or max(len(sources[i]), len(targets[i])) <= max_seq_len]
        if not kept:
            raise UserError(f"none of {len(pairs)} pairs has at most max_seq_len={max_seq_len} tokens a side. Raise it, or cut sentences.")
        self.num_too_long = len(pairs) - len(kept)
        self.sources, self.targets = TokenRows([sources[i] for i in kept]), TokenRows([targets[i] for i in kept])

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair's longer side, the end included, (N,): what buckets go by."""
        return np.maximum(self.sources.lengths, self.targets.lengths)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return (source (B, S), its mask (B, S), decoder inputs (B, T), targets (B, T)) of some pairs, padded on the right.

        The mask is True on tokens; targets are UNCOUNTED behind the end. Widths are multiples of WIDTH_STEP.
        """
        source_BS, mask_BS = pad_sources([self.sources[i] for i in indices], self.source_marks.pad_id)
        targets = [torch.from_numpy(self.targets[i].astype(np.int64)) for i in indices]
        shape = (len(targets), padded_width(max(map(len, targets))))
        inputs_BT, targets_BT = torch.full(shape, self.target_marks.pad_id), torch.full(shape, UNCOUNTED)
        inputs_BT[:, 0] = self.target_marks.start_id
        for i, row in enumerate(targets):
            inputs_BT[i, 1 : len(row)] = row[:-1]
            targets_BT[i, : len(row)] = row
        return source_BS, mask_BS, inputs_BT, targets_BT


def pad_sources(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of tokens padded on the right, (B, S), and the mask that is True on tokens; S is a multiple of WIDTH_STEP."""
    shape = (len(rows), padded_width(max(map(len, rows))))
    source_BS, mask_BS = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        source_BS[i, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask_BS[i, : len(row)] = True
    return source_BS, mask_BS
