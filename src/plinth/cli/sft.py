"""`plinth sft`: finetune a run's model on conversations; the loss counts the assistant's tokens only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.sft_config import SftConfig


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
    strict: bool = False
    """train only on a file of which no row is left out and in which `plinth inspect` finds nothing odd; else say what, exit with code 1"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth sft", args=argv)
    from plinth.posttraining.sft import train_sft

    if options.strict and not is_clean(options):
        return 1
    run = train_sft(options.out, options.run, options.messages, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json)
    return 0


def is_clean(options: Options) -> bool:
    """Look at the file as `plinth inspect --strict` does; say what was found when anything was."""
    from plinth.models.hub import read_config
    from plinth.posttraining.inspection import inspect_data
    from plinth.run import find_model
    from plinth.tokenizer.encode import Tokenizer

    folder = find_model(options.run)
    limit = options.config.max_seq_len or getattr(read_config(folder)[1], "max_seq_len", None)
    found = inspect_data(options.messages, Tokenizer.load(folder), limit, kind="messages", count=0)
    if not found.is_clean:
        say("\n".join([*found.lines(), "Nothing was trained, as --strict asks. Mend the rows, or leave --strict out."]))
    return found.is_clean
