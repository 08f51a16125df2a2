"""`plinth prefer`: tune a run's model to prefer chosen answers over rejected ones, by DPO or another loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.output import say
from plinth.cli.pretrain import show_run
from plinth.posttraining.preference import DpoConfig, train_dpo


@dataclass(frozen=True)
class Options:
    """Tune a run's model to prefer chosen answers over rejected ones, by DPO or another loss."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder to start from"""
    pairs: Path
    """preference pairs, JSON Lines: {"prompt", "chosen", "rejected"}"""
    out: Path
    """run directory to write"""
    config: Annotated[DpoConfig, tyro.conf.arg(name="")] = field(default_factory=DpoConfig)
    """batches, loss and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="plinth prefer", args=argv)
    run = train_dpo(options.out, options.run, options.pairs, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json)
    return 0
