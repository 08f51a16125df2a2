"""`plinth sft`: finetune a run's model on conversations; the loss counts the assistant's tokens only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.output import say
from plinth.cli.pretrain import show_run
from plinth.posttraining.sft import SftConfig, train_sft


@dataclass(frozen=True)
class Options:
    """Finetune a run's model on conversations; the loss counts the assistant's tokens only."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder to start from"""
    messages: Path
    """conversations, JSON Lines: {"messages": [{"role", "content"}, ...]}, or any format that `plinth inspect` reads as messages"""
    out: Path
    """run directory to write"""
    config: Annotated[SftConfig, tyro.conf.arg(name="")] = field(default_factory=SftConfig)
    """batches, loss and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="plinth sft", args=argv)
    run = train_sft(options.out, options.run, options.messages, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json)
    return 0
