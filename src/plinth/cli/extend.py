"""`plinth extend`: a pretraining with another horizon, from the checkpoint before its learning rate fell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.recipes.extending import extend


@dataclass(frozen=True)
class Options:
    """Train on from the checkpoint before a run's learning rate fell, as if the run had been begun with more steps."""

    run: Annotated[Path, tyro.conf.Positional]
    """pretraining run, finished or not; it is left as it is"""
    steps: int
    """updates in all, those before the checkpoint included"""
    out: Path
    """run directory to write"""
    decay_fraction: float | None = None
    """share of the updates, at the end, over which the learning rate falls (default: the run's)"""
    shards: tuple[Path, ...] = ()
    """shards folders, if they have moved"""
    tokenizer: Path | None = None
    """tokenizer folder, if it has moved"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth extend", args=argv)
    run = extend(
        options.out, options.run, options.steps, decay_fraction=options.decay_fraction, shards=options.shards,
        tokenizer_dir=options.tokenizer, argv=argv, warn=say,
    )  # fmt: skip
    show_run(run, options.json)
    return 0
