"""`plinth distill score`: a teacher's most probable tokens at every learnt position of some data, to distil from without the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.posttraining.distill_config import TeacherFileConfig


@dataclass(frozen=True)
class Options:
    """Write a teacher's most probable tokens at every learnt position of some data; `plinth distill --teacher` takes the folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder of the teacher"""
    data: Path
    """conversations or plain texts, in any format that `plinth inspect` reads as messages or text; their learnt tokens count"""
    out: Path
    """folder to write; 8 bytes a kept token"""
    config: Annotated[TeacherFileConfig, tyro.conf.arg(name="")] = field(default_factory=TeacherFileConfig)
    """what is kept, and how it is computed"""
    resume: bool = False
    """go on with the unfinished file in --out, by the configuration saved there"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth distill score", args=argv)
    from plinth.posttraining.teacher_file import write_teacher_file

    found = write_teacher_file(options.out, options.run, options.data, options.config, resume=options.resume, warn=say)

    def render(console: Console) -> None:
        console.print(
            f"{options.out}: {found['top_k']} tokens at each of {found['positions']:,} positions of {found['examples']:,} examples. "
            f"The others have {found['rest']:.2%} of the probability; the data's tokens cost {found['cross_entropy_nats']:.3f} nats.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    emit(found, options.json, render)
    return 0
