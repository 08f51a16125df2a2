"""`plinth data pack`: a corpus to token shards."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.data.shards import pack_corpus
from plinth.tokenizer.encode import Tokenizer


@dataclass(frozen=True)
class Options:
    """Encode a corpus into token shards that training and evaluation read by memory map."""

    corpus: Annotated[Path, tyro.conf.Positional]
    """a corpus folder that `plinth data curate` wrote"""
    tokenizer: Path
    """a tokenizer folder, ours or in Hugging Face's format"""
    out: Path
    """folder to write"""
    backwards: bool = False
    """turn each document's tokens round, for a language model that reads from the end (see docs/transfer.md)"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth data pack", args=argv)
    started = time.monotonic()
    manifest = pack_corpus(options.corpus, Tokenizer.load(options.tokenizer), options.out, backwards=options.backwards)
    result = {"path": str(options.out), **manifest, "time_s": round(time.monotonic() - started, 3)}
    emit(result, options.json, lambda console: show(console, result))
    return 0


def show(console: Console, result: dict[str, Any]) -> None:
    """Draw the tokens of each split and kind."""
    table = Table("split", "kind", "documents", "tokens", "bytes/token")
    for split, kinds in result["mixture"].items():
        for kind, entry in kinds.items():
            ratio = entry["bytes"] / entry["tokens"]
            table.add_row(split, kind, f"{entry['documents']:,}", f"{entry['tokens']:,}", f"{ratio:.2f}")
    console.print(table)
    console.print(f"{result['path']}: vocabulary {result['vocab_size']:,}, packed in {result['time_s']:.1f} s", markup=False)
