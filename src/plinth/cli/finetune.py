"""`plinth finetune`: an encoder learns labels of texts, tags of words, or answers to questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.finetuning import FinetuneConfig, finetune


@dataclass(frozen=True)
class Options:
    """Finetune a run's encoder on labelled examples, one a line of JSON.

    classify: {"text", "label"}, and "pair" for a second text. tag: {"words", "tags"}, or a file with a word and its tag a line.
    answer: {"question", "context", "answers": [{"text", "start"}]}, or SQuAD's own JSON.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """run or model folder of an encoder (BERT or ELECTRA) to start from"""
    data: Annotated[Path, tyro.conf.Positional]
    """labelled examples"""
    out: Path
    """run directory to write"""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    """task, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth finetune", args=argv)
    run = finetune(options.out, options.run, options.data, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json, next_verb="predict {run} heldout.jsonl")
    return 0
