"""`plinth reward score`: the answers of a file scored by a reward model, and what it is worth on pairs or rankings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.cli.reward import show_report
from plinth.posttraining.reward_config import TooLong


@dataclass(frozen=True)
class Options:
    """Score the answers of a file with a reward model; on pairs and rankings, report how often it agrees with their order."""

    run: Annotated[Path, tyro.conf.Positional]
    """run of `plinth reward`, or a folder with transformers' ForSequenceClassification of one label"""
    data: Path
    """pairs, rankings or conversations, in any format that `plinth inspect` reads"""
    adapter: Path | None = None
    """run of `plinth reward --adapter.rank`, or its adapter's folder: run is then the model that it belongs to"""
    out: Path | None = None
    """JSON Lines file to write, a line an answer: row, rank, score"""
    too_long: TooLong = "leave_out"
    """what becomes of pairs longer than the model's context: leave_out, or cut_start (the prompt loses its beginning)"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth reward score", args=argv)
    from plinth.recipes.reward import score_file

    found = score_file(options.run, options.data, adapter=options.adapter, out=options.out, too_long=options.too_long, warn=say)

    def render(console: Console) -> None:
        if "accuracy" in found:
            show_report(console, found)
        scores = found["scores"]
        console.print(f"Scores: mean {scores['mean']:.3f}, standard deviation {scores['std']:.3f}.", markup=False, highlight=False)

    emit(found, options.json, render)
    return 0
