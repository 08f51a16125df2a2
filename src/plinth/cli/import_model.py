"""`plinth import`: a published model made usable here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.recipes.importing import Imported, import_model
from plinth.recipes.parity import describe_parity


@dataclass(frozen=True)
class ImportOptions:
    """Check a published model, copy it, and compare its logits and tokens with transformers' (safetensors only, no code is run)."""

    source: Annotated[str, tyro.conf.Positional]
    """a folder, or an id on the Hugging Face hub such as org/name (extra `hub`; only then is the network used)"""
    out: Path
    """folder to write; must not hold anything yet"""
    revision: str | None = None
    """branch, tag or commit on the hub (default: main)"""
    check: bool = True
    """compare with transformers where it is installed; the weights are then held once in fp32"""
    check_python: Path | None = None
    """interpreter that has transformers; None = this one"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError for what we cannot compute and for damaged or pickled weights."""
    options = read_options(ImportOptions, args=argv, prog="plinth import")
    done = import_model(options.source, options.out, revision=options.revision, parity=options.check, python=options.check_python)

    def render(console: Console) -> None:
        for line in describe(done):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    emit(dataclasses.asdict(done), options.json, render)
    return 0


def describe(done: Imported) -> list[str]:
    """Return what was written, what is unusual about it, how it compares, and which verbs take it."""
    commit = f" at {done.revision[:12]}" if done.revision else ""
    return [
        f"{done.path}: {done.model_type} ({done.family}), {done.parameters:,} parameters, {done.size_bytes / 1e6:,.1f} MB, "
        f"from {done.source}{commit}",
        *(f"note: {note}." for note in done.notes),
        describe_parity(done.check),
        f"It goes with {done.used_by}.",
    ]
