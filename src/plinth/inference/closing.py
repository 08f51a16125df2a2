"""The way from an unfinished JSON document to a complete one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher

from plinth.tokenizer.tool_format import CALL_START

LONGEST_WAY = 256  # tokens looked ahead
LETTERS = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TAG = CALL_START.encode()
EMPTY = (b'""', b"[]", b"{}")
LAST = (9, 0)  # the place of tokens that lead nowhere


class TextState:
    """Whether the end of a document lies within a text between quotation marks. A tool call's tag begins a new document."""

    def __init__(self, inside: bool = False, escaped: bool = False, tail: bytes = b""):
        self.inside = inside
        self.escaped = escaped
        self._tail = tail  # the last bytes, in which the tag may have begun

    def push(self, spelled: bytes) -> None:
        """Take the document's next bytes."""
        for byte in spelled:
            if self.escaped:
                self.escaped = False
            elif byte == 0x22:
                self.inside = not self.inside
            elif byte == 0x5C:
                self.escaped = self.inside
            self._tail = (self._tail + bytes([byte]))[-len(TAG) :]
            if self._tail == TAG:
                self.inside = self.escaped = False

    def copy(self) -> TextState:
        """Return an equal state."""
        return TextState(self.inside, self.escaped, self._tail)


class Closer:
    """Finds short ways to a complete document by always taking the token that closes most.

    The way is an upper bound of the shortest, found in as many steps as it has tokens. token_bytes: what each token stands for.
    """

    SPARE = 4  # tokens left over when the way is taken: what a sampled token can open between two looks

    def __init__(self, token_bytes: Sequence[bytes]):
        self._token_bytes = token_bytes
        self._within = _ranks(token_bytes, _within_text)
        self._outside = _ranks(token_bytes, _outside)
        # Behind letters and digits a comma ends a number, where more digits would only make it longer.
        self._behind_number = _ranks(token_bytes, lambda spelled: (2, 1) if spelled.strip() == b"," else _outside(spelled))

    def way(self, matcher: LLMatcher, usable: np.ndarray, state: TextState) -> list[int] | None:
        """Return tokens that complete the document, [] where it is complete, or None where none is found within LONGEST_WAY.

        usable: one bit a token, as masks have them; others are not taken. The matcher and the state stay as they are.
        """
        matcher, state, way = matcher.deep_copy(), state.copy(), []
        words = np.zeros(-(-len(self._token_bytes) // 32), np.uint32)
        mask = words.view(np.uint8)[: len(usable)]
        while not matcher.is_accepting():
            if len(way) >= LONGEST_WAY or matcher.is_error():
                return None
            tokens = matcher.compute_ff_tokens()
            if not tokens:
                matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                ids = np.unpackbits(mask & usable, count=len(self._token_bytes), bitorder="little").nonzero()[0]
                if not len(ids):
                    return None
                tokens = [int(ids[self._rank(state, way)[ids].argmin()])]
            if not matcher.consume_tokens(tokens):
                return None
            way += tokens
            for token in tokens:
                state.push(self._token_bytes[token])
        return way

    def _rank(self, state: TextState, way: list[int]) -> np.ndarray:
        if state.inside:
            return self._within
        return self._behind_number if way and self._token_bytes[way[-1]].strip().isalnum() else self._outside


def _ranks(token_bytes: Sequence[bytes], place: Callable[[bytes], tuple[int, int]]) -> np.ndarray:
    places = [place(spelled) if spelled else LAST for spelled in token_bytes]
    ranks = np.empty(len(places), np.int32)
    ranks[sorted(range(len(places)), key=places.__getitem__)] = np.arange(len(places))
    return ranks


def _within_text(spelled: bytes) -> tuple[int, int]:
    """Return the place of a token within a text: the mark that ends it, with brackets behind; letters, many at a time; other bytes."""
    if spelled[:1] == b'"' and not spelled[1:].strip(b"]}"):
        return 0, -len(spelled)
    return (1, -len(spelled)) if not spelled.strip(LETTERS) else (2, len(spelled))  # one byte ends a character that is begun


def _outside(spelled: bytes) -> tuple[int, int]:
    """Return the place of a token between texts: brackets that close, empty values, marks, letters and digits, the rest."""
    signs = spelled.strip(b" \t\r\n")
    if not signs:
        return 6, len(spelled)
    if not signs.strip(b"}]"):
        return 0, -len(spelled)
    if signs[:2] in EMPTY and not signs[2:].strip(b"}]"):
        return 1, -len(spelled)
    if signs == b'"':
        return 2, len(spelled)
    if not signs.strip(LETTERS):
        return 3, len(spelled) if signs.isdigit() else -len(spelled)
    return (4 if signs in (b"[", b"{") else 5 if signs in (b",", b":") else 7), -len(spelled)
