"""A file of training examples looked at before it trains: what was read, what is odd, and exactly which tokens are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from plinth.config import UserError, write_atomic
from plinth.data.rejects import row_counts
from plinth.posttraining.checks import MEANINGS, REMARKS, Finding, check_rows, check_tokens
from plinth.posttraining.examples import Examples, Kind
from plinth.posttraining.formats import read_examples
from plinth.posttraining.masks import Part, answers_apart, render_row
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that spell whole characters and are all learnt, or all not."""

    text: str
    """what they spell; special tokens by name"""
    ids: list[int]
    """the tokens, nearly always one"""
    learnt: bool
    """whether the model is taught to predict them"""


@dataclass(frozen=True)
class Shown:
    """One sequence of a row, token by token."""

    row: int
    """the row's number in the file"""
    name: str
    """which sequence of the row: conversation, chosen, rejected, ..."""
    pieces: list[Piece]
    """all its tokens in order"""

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def learnt(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.learnt)


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    file: str
    """the file that was read"""
    examples: Examples
    """its rows, with those left out"""
    findings: list[Finding]
    """what is odd"""
    sequences: int
    """sequences that the rows make: two of a pair"""
    tokens: int
    """tokens of all sequences"""
    learnt: int
    """tokens of them that are learnt"""
    lengths: dict[str, int]
    """quantiles of the sequences' lengths, in tokens"""
    max_seq_len: int | None
    """the model's context in tokens"""
    shown: list[Shown] = field(default_factory=list)
    """some rows, token by token"""

    @property
    def is_clean(self) -> bool:
        """Whether no row was left out and nothing is odd; remarks, which no change of the rows would mend, do not count."""
        return not self.examples.rejected and all(finding.name in REMARKS for finding in self.findings)

    def lines(self) -> list[str]:
        """Return what was read and what is odd, a line each, without the rows' tokens."""
        share = self.learnt / self.tokens if self.tokens else 0.0
        sequences = f"{self.sequences} sequence{'' if self.sequences == 1 else 's'}"
        return [
            f"{self.file}: {self.examples.describe()}",
            f"{sequences}, {self.tokens} tokens, {self.learnt} of them learnt ({share:.1%})",
            "length in tokens: " + ", ".join(f"{name} {length}" for name, length in self.lengths.items()),
            *(f"! {finding.describe()}" for finding in self.findings),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a shown sequence's tokens are [ids, text, learnt]."""
        examples = self.examples
        return {
            "file": self.file, "kind": examples.kind, "detected": examples.detected, "rows": len(examples.rows),
            **row_counts(len(examples.rejected)), "rejected": [[number, reason] for number, reason in examples.rejected],
            "unread_fields": dict(examples.unread),
            "findings": [
                {"name": each.name, "meaning": MEANINGS[each.name], "count": len(each.rows), "rows": each.rows, "value": each.value}
                for each in self.findings
            ],
            "sequences": self.sequences, "tokens": self.tokens, "learnt_tokens": self.learnt,
            "learnt_share": self.learnt / self.tokens if self.tokens else 0.0, "length_tokens": self.lengths,
            "max_seq_len": self.max_seq_len,
            "shown": [
                {
                    "row": each.row, "name": each.name, "tokens": each.tokens, "learnt_tokens": each.learnt,
                    "pieces": [[piece.ids, piece.text, piece.learnt] for piece in each.pieces],
                }
                for each in self.shown
            ],
        }  # fmt: skip


def inspect_data(
    path: Path,
    tokenizer: Tokenizer,
    max_seq_len: int | None = None,
    *,
    kind: Kind | None = None,
    rows: Sequence[int] = (),
    count: int = 3,
    held_out: Path | None = None,
) -> Inspection:
    """Read a file, render every row, check all and show some: the rows with the numbers `rows`, else the first `count`.

    Raises UserError when the file cannot be read, or a row that is to be shown was left out or does not exist.
    """
    examples = read_examples(path, kind)
    parts, refused = render_all(answers_apart(tokenizer, examples), tokenizer)
    if refused:
        left = [i for i, number in enumerate(examples.numbers) if number not in dict(refused)]
        examples = Examples(
            examples.kind, [examples.rows[i] for i in left], [examples.numbers[i] for i in left], examples.detected,
            sorted([*examples.rejected, *refused]), examples.unread,
        )  # fmt: skip
    other = read_examples(held_out, examples.kind) if held_out is not None else None
    wanted = set(rows) or set(list(dict.fromkeys(examples.numbers))[:count])
    for number in sorted(wanted - set(examples.numbers)):
        reason = dict(examples.rejected).get(number, "the file has no such row")
        raise UserError(f"row {number} of {path} cannot be shown: {reason}.")
    lengths = np.array([len(part.rendered.tokens) for _, part in parts] or [0])
    return Inspection(
        str(path), examples, [*check_rows(examples, other), *check_tokens(parts, tokenizer, max_seq_len)],
        sequences=len(parts), tokens=int(lengths.sum()), learnt=sum(sum(part.rendered.loss_mask) for _, part in parts),
        lengths={f"{share:.0%}": int(np.quantile(lengths, share, method="higher")) for share in QUANTILES}, max_seq_len=max_seq_len,
        shown=[Shown(number, part.name, pieces_of(tokenizer, part.rendered)) for number, part in parts if number in wanted],
    )  # fmt: skip


def render_all(examples: Examples, tokenizer: Tokenizer) -> tuple[list[tuple[int, Part]], list[tuple[int, str]]]:
    """Return (row number, part) of all rows, and (row number, reason) of those that cannot be rendered, of which no part is kept."""
    parts: list[tuple[int, Part]] = []
    refused: list[tuple[int, str]] = []
    for number, row in zip(examples.numbers, examples.rows):
        try:
            parts += [(number, part) for part in render_row(tokenizer, row)]
        except UserError as error:
            refused.append((number, str(error).rstrip(".")))
    if refused and not parts:
        raise UserError(f"no row can be rendered by this tokenizer; row {refused[0][0]}: {refused[0][1]}.")
    broken = {number for number, _ in refused}
    return [(number, part) for number, part in parts if number not in broken], list(dict(refused).items())


def pieces_of(tokenizer: Tokenizer, rendered: Rendered) -> list[Piece]:
    """Return a sequence token by token; tokens that hold parts of one character stand together.

    The first token is never learnt, as nothing stands before it to predict it from.
    """
    pieces: list[Piece] = []
    ids: list[int] = []
    data = b""
    for i, token in enumerate(rendered.tokens):
        ids.append(token)
        data += tokenizer.token_bytes(token, skip_special=False)
        learnt = rendered.loss_mask[i] and i > 0
        last = i + 1 == len(rendered.tokens) or rendered.loss_mask[i + 1] != rendered.loss_mask[i] or i == 0
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            if not last and len(data) < 4:
                continue
            text = data.decode("utf-8", errors="replace")
        pieces.append(Piece(text, ids, learnt))
        ids, data = [], b""
    return pieces


def write_inspection_page(path: Path, inspection: Inspection) -> Path:
    """Write a self-contained HTML page, by rename, and return its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("plinth.posttraining", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    write_atomic(Path(path), environment.get_template("inspection.html.j2").render(view=inspection))
    return Path(path)
