"""`plinth pretrain --family awd-lstm`: a recurrent language model from token shards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.models.recurrent import AwdLstmConfig
from plinth.recipes.recurrent_pretraining import AwdLstmPretrainConfig, pretrain_awd_lstm
from plinth.tokenizer.encode import Tokenizer


@dataclass(frozen=True)
class Options:
    """Pretrain an AWD-LSTM, a recurrent language model, on shards that `plinth data pack` wrote."""

    shards: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """shards folders, one or more, packed with the same tokenizer"""
    tokenizer: Path
    """tokenizer folder that packed the shards"""
    out: Path
    """run directory to write"""
    config: Annotated[AwdLstmPretrainConfig, tyro.conf.arg(name="")] = field(default_factory=AwdLstmPretrainConfig)
    """model, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError for shards and tokenizer that do not fit."""
    options = read_options(Options, prog="plinth pretrain --family awd-lstm", args=argv)
    config = options.config
    if config.model.vocab_size == AwdLstmConfig.vocab_size:
        vocab_size = Tokenizer.load(options.tokenizer).vocab_size
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    run = pretrain_awd_lstm(options.out, options.shards, options.tokenizer, config, resume=options.resume, argv=argv, warn=say)
    show_run(run, options.json)
    return 0
