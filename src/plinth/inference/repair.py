"""JSON out of what a model wrote freely: found in its text, mended where the mistake is plain, never invented."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

FENCE = re.compile(r"```[a-zA-Z]*\s*\n?(.*?)(?:```|$)", re.DOTALL)
WORD = re.compile(r"[A-Za-z_][\w-]*")
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
LITERALS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
CLOSERS = {"{": "}", "[": "]"}
QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
MAX_DEPTH = 100


@dataclass(frozen=True)
class Repaired:
    """A document that was found in a text."""

    text: str
    """the document as JSON"""
    value: Any
    """the document itself"""
    changes: tuple[str, ...]
    """what was mended, each kind once; empty when the text was JSON as it stood"""


class _Beyond(Exception):
    """A mistake that is not plain."""


def repair_json(text: str) -> Repaired | None:
    """Return the JSON document in a text, mended, or None when there is none that can be made out.

    Mended are: text and code fences around it, single and typographic quotation marks, names without marks, Python's True, False
    and None, comments, commas too many or lacking, line breaks within texts, and an end that was cut off: what is open is closed,
    a name without a value is dropped. Nothing else is added.
    """
    try:
        return Repaired(text, json.loads(text), ())
    except (ValueError, RecursionError):
        pass
    fenced = FENCE.search(text)
    for candidate, change in ((fenced.group(1), "code fence"), (text, None)) if fenced else ((text, None),):
        start = min((at for at in map(candidate.find, "{[") if at >= 0), default=-1)
        if start < 0:
            continue
        parser = _Parser(candidate, start, change)
        try:
            value = parser.document()
        except _Beyond:
            continue
        return Repaired(json.dumps(value, ensure_ascii=False), value, tuple(dict.fromkeys(parser.changes)))
    return None


def _number(text: str) -> int | float:
    try:
        value = json.loads(text)
    except ValueError:  # a zero in front, or thousands of digits
        raise _Beyond from None
    if isinstance(value, float) and math.isinf(value):
        raise _Beyond
    return value


class _Parser:
    """Reads one value, forgiving; `changes` collects what it forgave."""

    def __init__(self, text: str, start: int, change: str | None):
        self.text, self.at, self.depth = text, start, 0
        self.changes = [change] if change else []

    def document(self) -> Any:
        before = self.text[: self.at]
        value = self._value()
        if before.strip() or self.text[self.at :].strip():
            self.changes.append("text around it")
        return value

    def _sign(self) -> str:
        """Skip white space and comments; return the next character, '' at the end."""
        while self.at < len(self.text):
            if self.text[self.at].isspace():
                self.at += 1
            elif self.text.startswith("//", self.at) or self.text.startswith("#", self.at):
                self._skip_to("\n", "comment")
            elif self.text.startswith("/*", self.at):
                self._skip_to("*/", "comment")
            else:
                return self.text[self.at]
        return ""

    def _skip_to(self, end: str, change: str) -> None:
        found = self.text.find(end, self.at)
        self.at = len(self.text) if found < 0 else found + len(end)
        self.changes.append(change)

    def _value(self) -> Any:
        sign = self._sign()
        if sign in CLOSERS and sign:
            return self._collection(sign)
        if sign in QUOTES and sign:
            return self._string(QUOTES[sign])
        if number := NUMBER.match(self.text, self.at):
            self.at = number.end()
            return _number(number.group())
        word = WORD.match(self.text, self.at)
        if word is None or word.group() not in LITERALS:
            raise _Beyond
        self.at = word.end()
        if word.group() not in ("true", "false", "null"):
            self.changes.append("Python's literals")
        return LITERALS[word.group()]

    def _collection(self, opener: str) -> Any:
        self.at += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Beyond
        entries: list[Any] = []
        while not self._closed(CLOSERS[opener]):
            self._entry(opener, entries)
        self.depth -= 1
        return dict(entries) if opener == "{" else entries

    def _closed(self, closer: str) -> bool:
        sign = self._sign()
        if sign == closer:
            self.at += 1
            return True
        if sign == "":
            self.changes.append("end cut off")
            return True
        return False

    def _entry(self, opener: str, entries: list[Any]) -> None:
        if self.text[self.at] == ",":
            self.at += 1
            self.changes.append("comma")
            return
        if self.text[self.at] in "}]":  # the other kind of bracket
            raise _Beyond
        if opener == "{":
            name = self._name()
            if self._sign() != ":":
                if self._sign() == "":
                    return
                raise _Beyond
            self.at += 1
            if self._sign() == "":
                return
            entries.append((name, self._value()))
        else:
            entries.append(self._value())
        self._separator(opener)

    def _separator(self, opener: str) -> None:
        sign = self._sign()
        if sign == ",":
            self.at += 1
            if self._sign() == CLOSERS[opener]:
                self.changes.append("comma")
        elif sign not in ("", CLOSERS[opener]):
            self.changes.append("comma")

    def _name(self) -> str:
        if self.text[self.at] in QUOTES:
            return self._string(QUOTES[self.text[self.at]])
        word = WORD.match(self.text, self.at)
        if word is None:
            raise _Beyond
        self.at = word.end()
        self.changes.append("name without quotation marks")
        return word.group()

    def _string(self, closer: str) -> str:
        if closer != '"':
            self.changes.append("quotation marks")
        self.at += 1
        signs: list[str] = []
        while self.at < len(self.text):
            sign = self.text[self.at]
            self.at += 1
            if sign == closer:
                return "".join(signs)
            if sign == "\\":
                sign = self._escape()
            elif sign < " ":
                self.changes.append("line break in a text")
            signs.append(sign)
        self.changes.append("end cut off")
        return "".join(signs)

    def _escape(self) -> str:
        sign = self.text[self.at : self.at + 1]
        self.at += 1
        if sign != "u":
            return ESCAPES.get(sign, sign)
        digits = self.text[self.at : self.at + 4]
        if not re.fullmatch("[0-9a-fA-F]{4}", digits):
            if self.at + 4 > len(self.text):
                self.at = len(self.text)  # cut off within it
                return ""
            raise _Beyond
        self.at += 4
        code = int(digits, 16)
        low = re.match(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})", self.text[self.at : self.at + 6])
        if 0xD800 <= code < 0xDC00 and low:
            self.at += 6
            code = 0x10000 + ((code - 0xD800) << 10) + int(low.group(1), 16) - 0xDC00
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"
