"""`plinth ppo`: tune a run's model towards a reward of its own completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.ppo_config import PpoConfig


@dataclass(frozen=True)
class Options:
    """Tune a run's model towards a reward of its own completions, by PPO; docs/ppo.md lists every detail and its switch."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder to start from, mostly one of `plinth sft`"""
    reward: str
    """run of a reward model, or a rule: verifier (that of a row of the data), a verifier by name (exact, numeric, ...), reviews"""
    data: Path
    """prompts, JSON Lines: {"prompt"}, or any format that `plinth inspect` reads, whose answers are left out"""
    out: Path
    """run directory to write"""
    config: Annotated[PpoConfig, tyro.conf.arg(name="")] = field(default_factory=PpoConfig)
    """roll-outs, updates and details"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth ppo", args=argv)
    from plinth.posttraining.ppo import train_ppo

    run = train_ppo(options.out, options.run, options.reward, options.data, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json)
    return 0
