"""`plinth pretrain --family gru`: recurrent sequence to sequence on parallel text; `--family lstm` shares its options."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.config import UserError
from plinth.models.recurrent_attention import Attention
from plinth.models.recurrent_seq2seq import RecurrentSeq2SeqConfig
from plinth.ops.recurrent import Cell
from plinth.recipes.recurrent_translation import RecurrentTranslationConfig, pretrain_recurrent


@dataclass(frozen=True)
class Options:
    """Train a recurrent encoder and decoder on parallel text, line i of one file being line i of the other translated."""

    pairs: tuple[Path, ...]
    """files of text in UTF-8, or gzip: a source and its translation, as many pairs of files as you have"""
    out: Path
    """run directory to write"""
    attention: Attention | None = None
    """none, additive (Bahdanau) or multiplicative (Luong); takes the place of model.attention"""
    tokenizer: tuple[Path, ...] = ()
    """tokenizer folder for both sides, or the source's and the target's (default: trained on the pairs)"""
    held_out: tuple[Path, ...] = ()
    """a source and its translation that are not trained on: the summary has the loss on them"""
    config: Annotated[RecurrentTranslationConfig, tyro.conf.arg(name="")] = field(default_factory=RecurrentTranslationConfig)
    """model, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    return train(argv, "gru")


def train(argv: list[str], cell: Cell) -> int:
    """Train the family's model; returns 0."""
    default = RecurrentTranslationConfig(model=RecurrentSeq2SeqConfig(cell=cell))
    options = read_options(
        Options,
        prog=f"plinth pretrain --family {cell}",
        args=argv,
        default=Options(pairs=tyro.MISSING, out=tyro.MISSING, config=default),
    )
    config = options.config
    if config.model.cell != cell:
        raise UserError(f"--family {cell} and --model.cell {config.model.cell} say two things. Name the family alone.")
    if options.attention is not None:
        config = replace(config, model=replace(config.model, attention=options.attention))
    run = pretrain_recurrent(
        options.out, options.pairs, config,
        tokenizers=options.tokenizer, held_out=options.held_out, resume=options.resume, argv=argv, warn=say,
    )  # fmt: skip
    show_run(run, options.json, next_verb="translate {run} --text '...'")
    return 0
