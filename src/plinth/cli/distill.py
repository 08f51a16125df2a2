"""`plinth distill`: a student learns a teacher's distributions of the next token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.distill_config import DistillConfig


@dataclass(frozen=True)
class Options:
    """Teach a run's model, the student, the distributions of a teacher's next token."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder of the student to start from"""
    teacher: Path
    """run, build or model folder of the teacher, with the same tokenizer; or a folder that `plinth distill score` wrote for the data"""
    data: Path
    """conversations or plain texts, in any format that `plinth inspect` reads as messages or text; their learnt tokens count"""
    out: Path
    """run directory to write"""
    config: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)
    """loss, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth distill", args=argv)
    from plinth.posttraining.distillation import distill

    run = distill(
        options.out, options.run, options.teacher, options.data, options.config, resume=options.resume, argv=argv, warn=say
    )  # fmt: skip
    show_run(run, options.json)
    return 0
