"""`plinth transfer classify`: labels of texts, learnt by a pretrained language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.transfer_config import TransferClassifyConfig


@dataclass(frozen=True)
class Options:
    """Put a head on a language model's pooled states and let it learn labels, from the top layer down (ULMFiT).

    Examples are one a line of JSON: {"text", "label"}, and "pair" for a second text. `plinth predict` uses and scores the result.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """run or model folder of an AWD-LSTM or a decoder"""
    data: Annotated[Path, tyro.conf.Positional]
    """labelled examples"""
    out: Path
    """run directory to write"""
    config: Annotated[TransferClassifyConfig, tyro.conf.arg(name="")] = field(default_factory=TransferClassifyConfig)
    """head, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth transfer classify", args=argv)
    from plinth.posttraining.text_classification import train_classifier

    run = train_classifier(options.out, options.run, options.data, options.config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json, next_verb="predict {run} heldout.jsonl")
    return 0
