"""`plinth transfer finetune-lm`: a pretrained language model learns the text of a task, before it learns the task's labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.posttraining.transfer_config import LmFinetuneConfig


@dataclass(frozen=True)
class Options:
    """Finetune a run's language model, an AWD-LSTM or a decoder, on shards of the target's text; no labels are needed (ULMFiT).

    With another tokenizer the model gets its vocabulary: what both spell alike keeps its weights, the rest begins at their mean.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """run or model folder of an AWD-LSTM or a decoder"""
    shards: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """shards folders of the target's text, one or more, packed with the same tokenizer"""
    out: Path
    """run directory to write"""
    tokenizer: Path | None = None
    """tokenizer folder that packed the shards (default: the run's own)"""
    config: Annotated[LmFinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=LmFinetuneConfig)
    """batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth transfer finetune-lm", args=argv)
    from plinth.recipes.language_model_finetuning import finetune_language_model

    run = finetune_language_model(
        options.out, options.run, options.shards, options.config,
        tokenizer_dir=options.tokenizer, resume=options.resume, argv=argv, warn=say,
    )  # fmt: skip
    show_run(run, options.json, next_verb="transfer classify {run} labelled.jsonl --out runs/labels")
    return 0
