"""What the plan must know of a text: its bytes, and how many bytes a token of each vocabulary holds."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plinth.config import UserError
from plinth.tokenizer.train import MIN_VOCAB_SIZE, train_tokenizer

VOCABULARIES = (1024, 2048, 4096, 8192)
SAMPLE_BYTES = 2_000_000
MIN_BYTES_PER_ENTRY = 64
MIN_CORPUS_BYTES = 10_000


@dataclass(frozen=True)
class VocabularyPoint:
    """How well a vocabulary compresses the text."""

    vocab_size: int
    """entries of the tokenizer"""
    bytes_per_token: float
    """bytes of text in a token, on text that the tokenizer was not trained on"""


@dataclass(frozen=True)
class CorpusStats:
    """The training text as the plan sees it."""

    text_bytes: int
    """bytes of training text, UTF-8"""
    documents: int
    """training documents"""
    vocabularies: tuple[VocabularyPoint, ...]
    """measured compression, in rising order of vocab_size"""
    has_instructions: bool = False
    """whether instruction data follows, so that finetuning needs a share of the budget"""

    def bytes_per_token(self, vocab_size: int) -> float:
        """Return the bytes a token at any vocabulary, linear in log(vocab_size) between the measured ones."""
        points = self.vocabularies
        if len(points) == 1:
            return points[0].bytes_per_token
        sizes = [point.vocab_size for point in points]
        right = min(max(bisect_right(sizes, vocab_size), 1), len(points) - 1)
        low, high = points[right - 1], points[right]
        share = math.log(vocab_size / low.vocab_size) / math.log(high.vocab_size / low.vocab_size)
        return max(1.0, low.bytes_per_token + share * (high.bytes_per_token - low.bytes_per_token))


def describe_corpus(
    texts: Sequence[str],
    *,
    has_instructions: bool = False,
    vocabularies: Sequence[int] = VOCABULARIES,
    sample_bytes: int = SAMPLE_BYTES,
) -> CorpusStats:
    """Measure a text: trains a small tokenizer for each vocabulary on a sample and counts tokens on other documents.

    Raises UserError when the text is too short to train anything on.
    """
    lengths = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
    total = sum(lengths)
    if total < MIN_CORPUS_BYTES:
        raise UserError(
            f"the text holds {total:,} bytes in {len(texts)} documents; a model needs at least {MIN_CORPUS_BYTES:,}. "
            "Name more files, or leave the path out to use the embedded default."
        )
    fitting, checking = _sample(texts, lengths, sample_bytes)
    sizes = [size for size in vocabularies if size * MIN_BYTES_PER_ENTRY <= total] or [max(MIN_VOCAB_SIZE, 512)]
    points = []
    for size in sorted(sizes):
        tokenizer = train_tokenizer(fitting, size)
        tokens = sum(map(len, tokenizer.encode_batch(checking)))
        checked_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in checking)
        points.append(VocabularyPoint(tokenizer.vocab_size, checked_bytes / max(1, tokens)))
    unique = {point.vocab_size: point for point in points}  # a short text may hold fewer merges than asked for
    return CorpusStats(total, len(texts), tuple(unique[size] for size in sorted(unique)), has_instructions)


def _sample(texts: Sequence[str], lengths: Sequence[int], sample_bytes: int) -> tuple[list[str], list[str]]:
    """Return documents to train tokenizers on and others, a tenth as much, to count tokens on: the same every time."""
    chunks = _chunks(texts)
    order = sorted(chunks, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    limit = min(sample_bytes, sum(lengths))
    checking: list[str] = []
    fitting: list[str] = []
    checked = taken = 0
    for text in order:
        size = len(text)
        if checked < limit // 10:
            checking.append(text)
            checked += size
        elif taken < limit:
            fitting.append(text)
            taken += size
    return fitting or checking, checking


def _chunks(texts: Iterable[str], characters: int = 4096) -> list[str]:
    """Cut documents into pieces, so that one long file does not make up the sample."""
    return [text[i : i + characters] for text in texts for i in range(0, len(text), characters)]
