"""Basic quality rules: each a pure function of one document that says why to drop it, or None to keep it.

The rules look for text that is no text: fragments, tables of numbers, minified code, loops, bytes read as characters. They know
no language and no topic. Limits differ between prose and code; a rule that is wrong for a corpus can be left out by name.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np

NGRAM_WORDS = 10
MIN_COMPRESSED_BYTES = 1024  # shorter texts say little about how far they compress

_LITERAL = re.compile(r"""[\s"'b({\[+-]*(?:\d|\\[xuU0-9])""")  # what opens a literal, then a digit or an escape


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where each rule draws its line for one kind of document."""

    min_bytes: int
    """Shortest document, bytes of UTF-8."""
    max_line_chars: int | None
    """Longest mean length of the non-blank lines, characters; None for prose, which may keep a paragraph on a line."""
    max_literal_lines: float | None
    """Largest share of lines that begin with a number or an escaped character, as tables of data saved as code do."""
    min_alphabetic: float
    """Smallest share of letters and their marks among the characters that are not white space."""
    max_unprintable: float
    """Largest share of control, unassigned, private and replacement characters."""
    max_repeated_lines: float
    """Largest share of characters in lines that have occurred before."""
    max_repeated_ngrams: float
    """Largest share of words inside runs of ten words that have occurred before."""
    max_compression: float
    """Largest ratio of the text's bytes to its size compressed by zlib at level 1."""


PROSE = Limits(20, None, None, 0.4, 0.02, 0.3, 0.3, 12.0)
CODE = Limits(30, 150, 0.45, 0.3, 0.02, 0.5, 0.5, 14.0)
SEQUENCE = Limits(10, None, None, 0.4, 0.02, 0.3, 0.3, 12.0)  # of residues: one line, one word
LIMITS = {"code": CODE, "text": PROSE, "docs": PROSE, "reference": PROSE, "protein": SEQUENCE, "nucleotide": SEQUENCE}


class Measures:
    """A text with what the rules count in it, each counted once and only when asked for."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def bytes(self) -> bytes:
        return self.text.encode("utf-8")

    @cached_property
    def lines(self) -> list[str]:
        """Return the lines that are not blank, stripped."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def characters(self) -> Counter[str]:
        """Return how often each character occurs."""
        return Counter(self.text)

    def count(self, classify: Callable[[str], bool]) -> int:
        """Return the number of characters of a class."""
        return sum(count for character, count in self.characters.items() if classify(character))


@lru_cache(maxsize=1 << 16)
def is_alphabetic(character: str) -> bool:
    """Return whether a character is a letter or a mark that belongs to one (Unicode L and M)."""
    return unicodedata.category(character)[0] in "LM"


@lru_cache(maxsize=1 << 16)
def is_unprintable(character: str) -> bool:
    """Return whether a character is control (but white space), unassigned, private use or the replacement character."""
    return character == "\ufffd" or (unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") and not character.isspace())


def too_short(measures: Measures, limits: Limits) -> str | None:
    """Drop fragments."""
    size = len(measures.text.strip().encode("utf-8"))
    return f"{size} bytes, fewer than {limits.min_bytes}" if size < limits.min_bytes else None


def unprintable(measures: Measures, limits: Limits) -> str | None:
    """Drop bytes that were read as characters."""
    share = measures.count(is_unprintable) / max(1, len(measures.text))
    return f"{share:.1%} unprintable characters, over {limits.max_unprintable:.0%}" if share > limits.max_unprintable else None


def low_alphabetic(measures: Measures, limits: Limits) -> str | None:
    """Drop tables of numbers and symbols."""
    visible = len(measures.text) - measures.count(str.isspace)
    share = measures.count(is_alphabetic) / max(1, visible)
    return f"{share:.1%} letters, under {limits.min_alphabetic:.0%}" if share < limits.min_alphabetic else None


def long_lines(measures: Measures, limits: Limits) -> str | None:
    """Drop minified and generated code."""
    if limits.max_line_chars is None or not measures.lines:
        return None
    mean = sum(map(len, measures.lines)) / len(measures.lines)
    return f"lines of {mean:.0f} characters on average, over {limits.max_line_chars}" if mean > limits.max_line_chars else None


def literal_lines(measures: Measures, limits: Limits) -> str | None:
    """Drop tables of data that were saved as code: character maps, arrays of numbers."""
    if limits.max_literal_lines is None:
        return None
    share = sum(map(bool, map(_LITERAL.match, measures.lines))) / max(1, len(measures.lines))
    return f"{share:.1%} of its lines are data, over {limits.max_literal_lines:.0%}" if share > limits.max_literal_lines else None


def repeated_lines(measures: Measures, limits: Limits) -> str | None:
    """Drop pages of boilerplate: the characters of every second and later occurrence of a line count as repeated."""
    total = sum(map(len, measures.lines))
    repeated = total - sum(map(len, set(measures.lines)))
    share = repeated / max(1, total)
    return f"{share:.1%} of it in repeated lines, over {limits.max_repeated_lines:.0%}" if share > limits.max_repeated_lines else None


def repeated_ngrams(measures: Measures, limits: Limits) -> str | None:
    """Drop loops of words: a word counts as repeated when it lies in a run of ten words that has occurred before."""
    share = repeated_ngram_share(measures.text.split())
    limit = limits.max_repeated_ngrams
    return f"{share:.1%} of its words in repeated runs, over {limit:.0%}" if share > limit else None


def compressible(measures: Measures, limits: Limits) -> str | None:
    """Drop loops in any script, with words or without: text that compresses as no writing does."""
    if len(measures.bytes) < MIN_COMPRESSED_BYTES:
        return None
    ratio = len(measures.bytes) / len(zlib.compress(measures.bytes, 1))
    return f"compresses {ratio:.1f}-fold, over {limits.max_compression:g}" if ratio > limits.max_compression else None


def repeated_ngram_share(words: list[str], n: int = NGRAM_WORDS) -> float:
    """Return the share of words covered by second and later occurrences of runs of `n` words, 0 to 1."""
    if len(words) <= n:
        return 0.0
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), dtype=np.uint64, count=len(words))
    num_runs = len(ids) - n + 1
    keys = np.zeros(num_runs, dtype=np.uint64)
    for offset in range(n):  # polynomial hash modulo 2**64 of each run
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + num_runs] + np.uint64(1)
        keys ^= keys >> np.uint64(31)
    first = np.zeros(num_runs, dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    starts = np.zeros(len(ids) + 1, dtype=np.int64)  # +1 where a repeated run begins, -1 behind its end
    repeated = np.flatnonzero(~first)
    np.add.at(starts, repeated, 1)
    np.add.at(starts, repeated + n, -1)
    return float((np.cumsum(starts)[:-1] > 0).mean())


Rule = Callable[[Measures, Limits], "str | None"]
RULES: dict[str, Rule] = {
    "too_short": too_short,
    "unprintable": unprintable,
    "low_alphabetic": low_alphabetic,
    "long_lines": long_lines,
    "literal_lines": literal_lines,
    "repeated_lines": repeated_lines,
    "repeated_ngrams": repeated_ngrams,
    "compressible": compressible,
}


def judge(text: str, kind: str, skip: frozenset[str] = frozenset()) -> tuple[str, str] | None:
    """Return (rule, reason) of the first rule that drops a document, or None to keep it. Unknown kinds are prose."""
    measures, limits = Measures(text), LIMITS.get(kind, PROSE)
    for name, rule in RULES.items():
        if name not in skip and (reason := rule(measures, limits)):
            return name, reason
    return None
