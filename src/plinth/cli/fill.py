"""`plinth fill`: words for the masks in a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.config import UserError
from plinth.data.parallel import read_lines
from plinth.inference.encoding import TextEncoder, fill


@dataclass(frozen=True)
class Options:
    """Fill the places that [MASK] (or the tokenizer's own name for it) stands for, each with its likeliest tokens."""

    run: Annotated[Path, tyro.conf.Positional]
    """run or model folder: --family bert, or electra, whose generator is taken"""
    text: tuple[str, ...] = ()
    """texts with [MASK] in them"""
    file: Path | None = None
    """texts, one a line"""
    top: int = 5
    """tokens shown for each place"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth fill", args=argv)
    texts = [*options.text, *([] if options.file is None else [line for line in read_lines(options.file) if line.strip()])]
    if not texts:
        raise UserError("there is no text. Pass --text 'a [MASK] b', or --file.")
    if options.top < 1:
        raise UserError(f"top={options.top} must be at least 1.")
    filled = fill(TextEncoder.load_filler(options.run), texts, options.top)

    def render(console) -> None:
        for one in filled:
            console.print(one.text, markup=False)
            for place in one.places:
                console.print("  " + "  ".join(f"{guess.text!r} {guess.probability:.3f}" for guess in place), markup=False)

    emit({"filled": [asdict(one) for one in filled]}, options.json, render)
    return 0
