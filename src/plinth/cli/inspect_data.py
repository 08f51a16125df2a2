"""`plinth inspect`: a file of training examples before it trains: what is read, what is odd, and exactly which tokens are learnt."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.text import Text

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.posttraining.examples import Kind
from plinth.run import find_model

JOINERS = "\u200c\u200d"  # of emoji and of several scripts
if TYPE_CHECKING:
    from plinth.posttraining.inspection import Inspection, Shown

STYLES = {True: "bold green underline", False: "dim"}


@dataclass(frozen=True)
class InspectCommand:
    """Show what a file of training examples holds, what is odd about it, and exactly which tokens of it are learnt."""

    data: Annotated[Path, tyro.conf.Positional]
    """examples: JSON Lines (or .gz), a JSON array or Parquet; the format is recognised and said"""
    run: Path
    """run, build or model folder whose tokenizer, chat template and context are used"""
    kind: Kind | None = None
    """what to read the rows as (default: what most of them are)"""
    rows: tuple[int, ...] = ()
    """numbers of the rows to show token by token (default: the first ones)"""
    count: int = 3
    """rows to show where --rows names none"""
    held_out: Path | None = None
    """file that must share no row with the data"""
    html: Path | None = None
    """page to write beside the answer, self-contained HTML"""
    strict: bool = False
    """exit with code 1 when a row is left out or anything is odd"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Print what was found; exit code 0, or 1 with --strict when something was."""
    command = read_options(InspectCommand, args=argv, prog="plinth inspect", description=InspectCommand.__doc__)
    from plinth.models.hub import read_config
    from plinth.posttraining.inspection import inspect_data, write_inspection_page
    from plinth.tokenizer.encode import Tokenizer

    folder = find_model(command.run)
    max_seq_len = getattr(read_config(folder)[1], "max_seq_len", None)
    found = inspect_data(
        command.data, Tokenizer.load(folder), max_seq_len,
        kind=command.kind, rows=command.rows, count=command.count, held_out=command.held_out,
    )  # fmt: skip
    if command.html is not None:
        write_inspection_page(command.html, found)
    page = {} if command.html is None else {"html": str(command.html)}
    emit(found.to_dict() | page, command.json, lambda console: show(console, found, command.html))
    return 1 if command.strict and not found.is_clean else 0


def show(console: Console, found: Inspection, page: Path | None) -> None:
    """Draw what was found, the rows' tokens last."""
    for line in found.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for each in found.shown:
        console.print(
            f"\nrow {each.row}, {each.name}: {each.learnt} of {each.tokens} tokens learnt", markup=False, highlight=False, soft_wrap=True
        )
        console.print(coloured(each, console.color_system is None), soft_wrap=True)
    if page is not None:
        console.print(f"\n{page}: open it in a browser", markup=False, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """Return a text that a terminal can only show: control characters and marks of direction are spelled out, not obeyed."""
    return "".join(
        each
        if each in "\n\t" or unicodedata.category(each) not in ("Cc", "Cf") or each in JOINERS
        else each.encode("unicode_escape").decode()
        for each in text
    )


def coloured(shown: Shown, plain: bool) -> Text:
    """Return the tokens with the learnt ones in colour; where there are no colours, between double brackets."""
    text = Text()
    inside = False
    for piece in shown.pieces:
        if plain and piece.learnt != inside:
            text.append("]]" if inside else "[[")
            inside = piece.learnt
        text.append(visible(piece.text), style=STYLES[piece.learnt])
    return text.append("]]" if inside else "")
