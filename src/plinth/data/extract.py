"""Text from HTML: a page's own words in reading order, without scripts, styles, forms and the navigation around the text.

The page is scanned once for tags, whatever they nest in and whether they close; the work is linear in its length, also for pages
made to be slow, where tree-building parsers and the standard library's are not.
"""

from __future__ import annotations

import html as entities
import re
from collections.abc import Iterator

RAW = frozenset({"script", "style"})  # hold no markup: they end at their own end tag only
NEVER_TEXT = RAW | {"template", "noscript", "svg", "iframe", "object", "canvas"}
AROUND_TEXT = frozenset({"nav", "footer", "aside", "form", "button", "select", "menu", "dialog"})
PARAGRAPH = frozenset(
    {"p", "h1", "h2", "h3", "h4", "h5", "h6", "title", "section", "article", "main", "header", "blockquote", "pre"}
    | {"ul", "ol", "dl", "table", "figure", "hr", "body", "div"}
)
LINE = frozenset({"br", "li", "tr", "dt", "dd", "figcaption", "caption", "option", "summary"})
CELL = frozenset({"td", "th"})
TAG_WINDOW = 1024  # characters within which quotes in a tag are honoured; a longer tag ends at its first ">"

_TAG_NAME = re.compile(r"/?[a-zA-Z][^\s/>]*")
_TAG_REST = re.compile(r"""(?:[^>"']++|"[^"]*+"|'[^']*+')*+>""")
_SPACES = re.compile(r"[ \t\r\n\f]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_KEPT_SPACE, _KEPT_TAB = "\ufdd0", "\ufdd1"  # stand for white space of preformatted text until lines are stripped


def html_to_text(html: str) -> str:
    """Return the readable text of a page; paragraphs are separated by a blank line, table cells by a tab.

    A page that never closes its navigation would lose its text with it; such a page is read again with less left out.
    """
    pieces: list[str] = []
    for skipped in (NEVER_TEXT | AROUND_TEXT, NEVER_TEXT, RAW):
        pieces, closed = _readable_pieces(html, skipped)
        if closed:
            break
    lines = [line.strip(" \t") for line in "".join(pieces).split("\n")]
    lines = [line.replace(_KEPT_SPACE, " ").replace(_KEPT_TAB, "\t").rstrip() for line in lines]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def _readable_pieces(html: str, skipped: frozenset[str]) -> tuple[list[str], bool]:
    """Return words, line breaks and paragraph breaks in order, and whether every skipped element was closed."""
    pieces: list[str] = []
    open_counts: dict[str, int] = {}
    num_open = num_pre = 0
    for kind, value in tokens(html):
        if kind == "text":
            if num_open == 0:
                pieces.append(value.replace(" ", _KEPT_SPACE).replace("\t", _KEPT_TAB) if num_pre else _SPACES.sub(" ", value))
        elif value in skipped:
            change = 1 if kind == "start" else -1 if open_counts.get(value, 0) else 0
            open_counts[value] = open_counts.get(value, 0) + change
            num_open += change
        elif value in PARAGRAPH:
            pieces.append("\n\n")
            if value == "pre":
                num_pre = max(0, num_pre + (1 if kind == "start" else -1))
        elif kind == "start" and value in LINE:
            pieces.append("\n- " if value == "li" else "\n")
        elif kind == "start" and value in CELL:
            pieces.append("\t")
    return pieces, num_open == 0


def tokens(html: str) -> Iterator[tuple[str, str]]:
    """Yield ("text", words with entities resolved), ("start", tag name) and ("end", tag name) in order.

    Comments and declarations are left out; what looks like markup but never ends is text.
    """
    position, comments_end = 0, True
    while position < len(html):
        opening = html.find("<", position)
        if opening < 0:
            break
        if opening > position:
            yield "text", entities.unescape(html[position:opening])
        if html.startswith(("<!", "<?"), opening):
            end = html.find("-->", opening + 4) if comments_end and html.startswith("<!--", opening) else -1
            if end < 0 and html.startswith("<!--", opening):
                comments_end = False
            end = end + 2 if end >= 0 else html.find(">", opening)
            position = end + 1
        elif name := _TAG_NAME.match(html, opening + 1):
            rest = _TAG_REST.match(html, name.end(), name.end() + TAG_WINDOW)
            end = rest.end() - 1 if rest else html.find(">", name.end())
            position = end + 1
        else:
            yield "text", "<"
            position = opening + 1
            continue
        if end < 0:
            position = opening
            break
        if html[opening + 1] in "!?":
            continue
        tag = name[0].lower()
        yield ("end", tag[1:]) if tag.startswith("/") else ("start", tag)
        if html[end - 1] == "/":
            yield "end", tag.removeprefix("/")
        elif tag in RAW:
            closing = re.compile(f"</{tag}", re.IGNORECASE).search(html, position)
            position = closing.start() if closing else len(html)
    if position < len(html):
        yield "text", entities.unescape(html[position:])
