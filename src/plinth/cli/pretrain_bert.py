"""`plinth pretrain --family bert`: an encoder that learns hidden tokens, from token shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.recipes.encoder_pretraining import BertConfig, pretrain_encoder


@dataclass(frozen=True)
class Options:
    """Pretrain an encoder (BERT) on shards that `plinth data pack` wrote: it learns tokens that are hidden from both sides."""

    shards: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """shards folders, one or more, packed with the same tokenizer"""
    tokenizer: Path
    """tokenizer folder that packed the shards; [CLS], [SEP] and [MASK] are added where it lacks them"""
    out: Path
    """run directory to write"""
    config: Annotated[BertConfig, tyro.conf.arg(name="")] = field(default_factory=BertConfig)
    """model, rows and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth pretrain --family bert", args=argv)
    run = pretrain_encoder(
        options.out, options.shards, options.tokenizer, options.config, resume=options.resume, argv=argv, warn=say
    )  # fmt: skip
    show_run(run, options.json, next_verb="fill {run} --text 'a [MASK] b'")
    return 0
