"""`plinth grpo`: reinforcement learning with verifiable rewards, by GRPO or one of its kin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.grpo_config import GrpoConfig


@dataclass(frozen=True)
class Options:
    """Train a run's model on problems whose answers can be checked, by GRPO or one of its kin."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder to start from"""
    data: Path
    """problems, JSON Lines: {"prompt", "answer", "verifier"}, or any format that `plinth inspect` reads as verifiable"""
    out: Path
    """run directory to write"""
    config: Annotated[GrpoConfig, tyro.conf.arg(name="")] = field(default_factory=GrpoConfig)
    """loss, rewards, roll-outs and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth grpo", args=argv)
    from plinth.posttraining.grpo import train_grpo

    run = train_grpo(options.out, options.run, options.data, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json)
    return 0
