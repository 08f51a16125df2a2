"""Rows for masked-token training from token shards: [CLS] text [SEP], as full rows of running text or as one document a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets, padded_width
from plinth.data.loader import TokenLoader
from plinth.data.masking import MaskingConfig, mask_tokens
from plinth.data.rows import IGNORE
from plinth.data.shards import open_split, read_manifest
from plinth.tokenizer.encoder_tokens import EncoderTokens

Rows = Literal["stream", "document"]
MASKS, GUESSES = 11, 12  # streams of random numbers beside the loader's own


@dataclass(frozen=True)
class RowConfig:
    """Which rows a step has."""

    rows: Rows = "stream"
    """running text cut at the ends of full rows (stream), or a document a row, padded, long ones in pieces (document)"""
    seq_len: int = 128
    """longest row in tokens, the two marks at its ends included"""
    sequences_per_step: int = 64
    """rows an update"""
    micro_batch_size: int = 16
    """rows a forward pass"""

    def __post_init__(self) -> None:
        if self.seq_len < 3:
            raise UserError(f"seq_len={self.seq_len} must be at least 3: two marks and a token.")
        if self.sequences_per_step < 1 or self.micro_batch_size < 1:
            raise UserError("sequences_per_step and micro_batch_size must be at least 1.")


class EncoderRows:
    """Masked micro-batches of each step; every method is a pure function of its arguments and the seed."""

    def __init__(
        self, shards: Sequence[Path], split: str, config: RowConfig, masking: MaskingConfig, tokens: EncoderTokens,
        ordinary: np.ndarray, seed: int,
    ):  # fmt: skip
        """`ordinary` are the ids of tokens that are no special ones. Raises UserError for shards without text in the split."""
        assert tokens.mask is not None, "a tokenizer made by with_encoder_tokens has a mask token"
        self.shards, self.config, self.masking, self.tokens, self.ordinary = list(shards), config, masking, tokens, ordinary
        self.seed, self.split = seed, split
        self._is_ordinary = np.zeros(int(max(ordinary.max(), tokens.mask, tokens.cls, tokens.sep, tokens.pad)) + 1, dtype=bool)
        self._is_ordinary[ordinary] = True
        inner = config.seq_len - 2
        self._source: _Stream | _Documents
        if config.rows == "stream":
            self._source = _Stream(TokenLoader(self.shards, inner, config.sequences_per_step, seed, split), config.micro_batch_size)
        else:
            self._source = _Documents(self.shards, split, inner, config, seed)

    @property
    def steps_per_epoch(self) -> int:
        return self._source.steps_per_epoch

    def batches(self, step: int, guesses: bool = False) -> list[tuple[torch.Tensor, ...]]:
        """Return the micro-batches of a step: (inputs, targets, mask), (B, T) each, and with `guesses` uniform numbers behind them."""
        found = []
        for i, texts in enumerate(self._source.texts(step)):
            rows, real = self.padded(texts)
            rng = np.random.Generator(np.random.PCG64([self.seed, MASKS, step, i]))
            inputs, targets = mask_tokens(rows, self._is_ordinary[rows] & real, self.tokens.mask, self.ordinary, self.masking, rng)
            parts = [inputs, targets, real]
            if guesses:
                uniform = np.random.Generator(np.random.PCG64([self.seed, GUESSES, step, i])).random(rows.shape, dtype=np.float32)
                parts.append(uniform)
            found.append(tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))
        return found

    def padded(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return rows [CLS] text [SEP] padded to one width, and where they hold no padding."""
        width = max(len(text) for text in texts) + 2
        width = width if width == self.config.seq_len else min(padded_width(width), self.config.seq_len)
        rows = np.full((len(texts), width), self.tokens.pad, dtype=np.int64)
        real = np.zeros(rows.shape, dtype=bool)
        for row, where, text in zip(rows, real, texts):
            row[0], row[1 : len(text) + 1], row[len(text) + 1] = self.tokens.cls, text, self.tokens.sep
            where[: len(text) + 2] = True
        return rows, real

    def unigram_nats(self, steps: int = 4) -> np.ndarray:
        """Return the cost in nats of each id when only its frequency in the first steps' text is known, one more seen of each."""
        counts = np.ones(len(self._is_ordinary))
        for step in range(steps):
            for texts in self._source.texts(step):
                counts += np.bincount(np.concatenate(texts), minlength=len(counts))
        counts = np.where(self._is_ordinary, counts, 0.0)
        with np.errstate(divide="ignore"):
            return -np.log(counts / counts.sum())

    def describe(self, step: int, rows: Sequence[int] | None, decode) -> str:
        """Name the rows of a step that look wrong by how their text begins."""
        texts = [text for part in self._source.texts(step) for text in part]
        chosen = list(rows or range(len(texts)))[:3]
        return "; ".join(f"row {row} of step {step + 1} ({decode(texts[row][:40].tolist())[:60]!r})" for row in chosen)

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the rows depend on, in JSON values."""
        return {
            "tokens": [read_manifest(folder).get("sha256") for folder in self.shards],
            "rows": [self.config.rows, self.config.seq_len, self.config.sequences_per_step, self.config.micro_batch_size],
            "masking": [self.masking.share, self.masking.masked, self.masking.random],
            "seed": self.seed,
        }


class _Stream:
    """Rows of running text, documents end to end with <|endoftext|> between."""

    def __init__(self, loader: TokenLoader, micro_batch_size: int):
        self.loader, self.micro_batch_size = loader, micro_batch_size
        self.steps_per_epoch = max(1, loader.num_tokens // (loader.seq_len * loader.sequences_per_step))

    def texts(self, step: int) -> list[list[np.ndarray]]:
        targets = self.loader.batch(step)[1].numpy()  # each token once an epoch
        rows = [row[row != IGNORE] for row in targets]
        return [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]


class _Documents:
    """A document a row, cut where it is longer; like lengths share a micro-batch."""

    def __init__(self, shards: Sequence[Path], split: str, inner: int, config: RowConfig, seed: int):
        self.splits = [open_split(folder, split) for folder in shards]
        places = [_pieces(part.offsets, inner) for part in self.splits]
        self.number = np.repeat(np.arange(len(places)), [len(starts) for starts, _ in places])
        self.starts = np.concatenate([starts for starts, _ in places])
        self.lengths = np.concatenate([lengths for _, lengths in places])
        if not len(self.lengths):
            raise UserError(f"the {split} split of {', '.join(map(str, shards))} holds no text. Pack a corpus that has some.")
        self.buckets = LengthBuckets(self.lengths, config.sequences_per_step, config.micro_batch_size, seed)
        self.steps_per_epoch = self.buckets.steps_per_epoch

    def texts(self, step: int) -> list[list[np.ndarray]]:
        return [[self._text(i) for i in part] for part in self.buckets.indices(step)]

    def _text(self, i: int) -> np.ndarray:
        start = self.starts[i]
        return self.splits[self.number[i]].tokens[start : start + self.lengths[i]].astype(np.int64)


def _pieces(offsets: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the pieces of documents start and how long they are, each at most `longest`; the end-of-text token is left out."""
    starts, lengths = np.asarray(offsets[:-1]), np.diff(offsets) - 1
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    counts = -(-lengths // longest)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.repeat(starts + lengths, counts)
    begins = np.repeat(starts, counts) + place * longest
    return begins, np.minimum(ends - begins, longest)
