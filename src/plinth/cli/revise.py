"""`plinth revise`: a model criticises and rewrites its own answers by a constitution."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.inference.endpoint import EndpointConfig
from plinth.posttraining.feedback_config import RevisionConfig


@dataclass(frozen=True)
class Options:
    """Let a model answer prompts, criticise its answers by principles and write them anew; write data for `plinth sft` and `prefer`."""

    data: Annotated[Path, tyro.conf.Positional]
    """prompts: rows of a prompt alone, or any format that `plinth inspect` reads, of which what stands before the last answer is taken"""
    principles: Path
    """constitution: a text file with one principle a line"""
    out: Path
    """folder to write: sft.jsonl, pairs.jsonl, report.json, and asked.jsonl, from which an interrupted call goes on"""
    model: Path | None = None
    """run, build or model folder of the model"""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """server of the model, in the place of a folder"""
    config: Annotated[RevisionConfig, tyro.conf.arg(name="")] = field(default_factory=RevisionConfig)
    """how it is asked"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when there is no prompt, or no answer is whole."""
    options = read_options(Options, prog="plinth revise", args=argv)
    from plinth.recipes.feedback import open_model
    from plinth.recipes.revising import make_revisions

    model = open_model(options.model, options.endpoint)
    report = make_revisions(model, options.data, options.principles, options.out, options.config, say)
    lines = [
        f"{report['sft_rows']} revised answers, {report['pairs']} pairs; {report['unchanged']} unchanged, {report['left_out']} left out",
        f"Next: plinth sft RUN --messages {options.out}/sft.jsonl --out NEW",
    ]
    emit(report, options.json, lambda console: console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True))
    return 0
