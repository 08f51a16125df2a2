"""Text from HTML, with the parser of the standard library.

A page's own words are kept in reading order: headings, paragraphs, lists, tables, preformatted blocks. Scripts, styles, forms
and the navigation around the text are left out. The work is linear in the length of the page, however deeply it nests.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

NEVER_TEXT = frozenset({"script", "style", "template", "noscript", "svg", "iframe", "object", "canvas"})
AROUND_TEXT = frozenset({"nav", "footer", "aside", "form", "button", "select", "menu", "dialog"})
PARAGRAPH = frozenset(
    {"p", "h1", "h2", "h3", "h4", "h5", "h6", "title", "section", "article", "main", "header", "blockquote", "pre"}
    | {"ul", "ol", "dl", "table", "figure", "hr", "body", "div"}
)
LINE = frozenset({"br", "li", "tr", "dt", "dd", "figcaption", "caption", "option", "summary"})
CELL = frozenset({"td", "th"})

_SPACES = re.compile(r"[ \t\r\n\f]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_KEPT_SPACE, _KEPT_TAB = "\ufdd0", "\ufdd1"  # stand for white space of preformatted text until lines are stripped


def html_to_text(html: str) -> str:
    """Return the readable text of a page; paragraphs are separated by a blank line, table cells by a tab.

    A page that never closes its navigation would lose its text with it; such a page is read again with navigation kept.
    """
    html = html.replace("<![", "<!-[")  # a comment as browsers read it; the parser's own handling of marked sections can fail
    reader = _PageReader(NEVER_TEXT | AROUND_TEXT)
    reader.feed(html)
    reader.close()
    if reader.open_skips:
        reader = _PageReader(NEVER_TEXT)
        reader.feed(html)
        reader.close()
    return reader.text()


class _PageReader(HTMLParser):
    """Collects the pieces of text of a page; a piece is words, a line break or a paragraph break."""

    def __init__(self, skipped: frozenset[str]):
        super().__init__(convert_charrefs=True)
        self._skipped = skipped
        self._open: dict[str, int] = {}
        self.open_skips = 0
        self._preformatted = 0
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._skipped:
            self._open[tag] = self._open.get(tag, 0) + 1
            self.open_skips += 1
        elif tag in PARAGRAPH:
            self._pieces.append("\n\n")
            self._preformatted += tag == "pre"
        elif tag in LINE:
            self._pieces.append("\n- " if tag == "li" else "\n")
        elif tag in CELL:
            self._pieces.append("\t")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self._skipped:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            if self._open.get(tag, 0):
                self._open[tag] -= 1
                self.open_skips -= 1
        elif tag in PARAGRAPH:
            self._pieces.append("\n\n")
            if tag == "pre" and self._preformatted:
                self._preformatted -= 1

    def handle_data(self, data: str) -> None:
        if not self.open_skips:
            self._pieces.append(data.replace(" ", _KEPT_SPACE).replace("\t", _KEPT_TAB) if self._preformatted else _SPACES.sub(" ", data))

    def text(self) -> str:
        lines = [line.strip(" \t") for line in "".join(self._pieces).split("\n")]
        lines = [line.replace(_KEPT_SPACE, " ").replace(_KEPT_TAB, "\t").rstrip() for line in lines]
        return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")
