"""`plinth pretrain --family transformer`: the encoder-decoder of 2017 on parallel text; `--family t5` shares its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.recipes.translation import TranslationConfig, pretrain_translation


@dataclass(frozen=True)
class Options:
    """Train an encoder-decoder on parallel text, line i of one file being line i of the other translated."""

    pairs: tuple[Path, ...]
    """files of text in UTF-8, or gzip: a source and its translation, as many pairs of files as you have"""
    out: Path
    """run directory to write"""
    tokenizer: tuple[Path, ...] = ()
    """tokenizer folder for both sides, or the source's and the target's (default: trained on the pairs)"""
    held_out: tuple[Path, ...] = ()
    """a source and its translation that are not trained on: the summary has the loss on them"""
    config: Annotated[TranslationConfig, tyro.conf.arg(name="")] = field(default_factory=TranslationConfig)
    """model, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    return train(argv, "transformer", TranslationConfig())


def train(argv: list[str], family: str, default: TranslationConfig) -> int:
    """Train the family's model; returns 0."""
    options = read_options(
        Options,
        prog=f"plinth pretrain --family {family}",
        args=argv,
        default=Options(pairs=tyro.MISSING, out=tyro.MISSING, config=default),
    )
    run = pretrain_translation(
        options.out, options.pairs, options.config,
        tokenizers=options.tokenizer, held_out=options.held_out, resume=options.resume, argv=argv, warn=say,
    )  # fmt: skip
    show_run(run, options.json, next_verb="translate {run} --text '...'")
    return 0
