"""`plinth prefer`: tune a run's model on preferences: pairs by DPO and its kin, labelled answers by KTO and its kin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.preference_config import DpoConfig


@dataclass(frozen=True)
class Options:
    """Tune a run's model on preferences: pairs by DPO and its kin, labelled single answers by KTO and its kin."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder to start from"""
    pairs: Annotated[Path, tyro.conf.arg(aliases=["--data"])]
    """pairs, rankings or labelled answers, in any format that `plinth inspect` reads as preference, ranking or unpaired"""
    out: Path
    """run directory to write"""
    config: Annotated[DpoConfig, tyro.conf.arg(name="")] = field(default_factory=DpoConfig)
    """batches, loss and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth prefer", args=argv)
    from plinth.posttraining.preference import train_dpo

    run = train_dpo(options.out, options.run, options.pairs, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json)
    return 0
