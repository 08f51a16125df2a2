"""`plinth data curate`: text files to a deduplicated, filtered corpus with a manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.data.curate import CurateConfig, curate
from plinth.data.sources import read_documents

MAX_SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Read text, drop duplicates and what is no text, hold documents out, and write a corpus with a manifest."""

    source: Annotated[tuple[str, ...], tyro.conf.Positional]
    """files and folders of text, or `stdlib` for the standard library of the running Python"""
    out: Path
    """folder to write"""
    text_field: tuple[str, ...] = ()
    """fields of JSON, CSV and parquet records that hold the text, joined by a blank line (default: text, content, ...)"""
    config: Annotated[CurateConfig, tyro.conf.arg(name="")] = field(default_factory=CurateConfig)
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth data curate", args=argv)
    started = time.monotonic()
    manifest = curate(read_documents(options.source, options.text_field), options.out, options.config)
    result = {"path": str(options.out), **manifest, "time_s": round(time.monotonic() - started, 3)}
    emit(result, options.json, lambda console: show(console, result))
    return 0


def show(console: Console, result: dict[str, Any]) -> None:
    """Draw what was read, what each gate dropped and what is left."""
    for example in result["intake"]["examples"]:
        console.print(f"[dim]{escape(example['source'])} ({example['kind']}, {example['bytes']:,} bytes)[/] {escape(example['excerpt'])}")
    _show_unused(console, result)
    funnel = Table("gate", "kept", "dropped", "an example", title="documents")
    funnel.add_row("read", f"{result['documents_in']:,}", "", f"{result['documents_cut']} long ones cut" if result["documents_cut"] else "")
    for rule in result["rules"]:
        example = next((f"{e['source']}: {e['reason']}" for e in rule["examples"]), "")
        funnel.add_row(rule["rule"].replace("_", " "), f"{rule['kept']:,}", f"{rule['dropped']:,}", escape(example))
    console.print(funnel)
    left = Table("kind", "documents", "MB", title="corpus")
    for kind, entry in result["composition"].items():
        left.add_row(kind, f"{entry['documents']:,}", f"{entry['bytes'] / 1e6:.2f}")
    console.print(left)
    for warning in result["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")
    console.print(
        f"{escape(result['path'])}: {result['documents_train']:,} documents to train on ({result['bytes_train'] / 1e6:.2f} MB), "
        f"{result['documents_heldout']:,} held out ({result['bytes_heldout'] / 1e6:.2f} MB), in {result['time_s']:.1f} s"
    )


def _show_unused(console: Console, result: dict[str, Any]) -> None:
    rejected = result["rejected_files"]
    for reject in rejected[:MAX_SHOWN]:
        console.print(f"not used: {escape(reject['path'])}: {escape(reject['reason'])}")
    if len(rejected) > MAX_SHOWN:
        console.print(f"and {len(rejected) - MAX_SHOWN} more files not used; manifest.json lists them all")
    for bad in result["malformed"][:MAX_SHOWN]:
        console.print(f"{escape(bad['path'])}: {bad['count']} not usable; {escape('; '.join(bad['first']))}")
