"""`plinth known`: what a model knows of its training questions, and data that teach it to decline the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.tasks.knowledge import KnowledgeConfig


@dataclass(frozen=True)
class Options:
    """Ask a model its own training questions by sampling; split them by how often it is right; write data for `plinth sft` and `prefer`."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder to ask"""
    data: Path
    """questions with answers: what `plinth inspect` reads as messages, or as verifiable; a field fact_id joins phrasings of one fact"""
    out: Path
    """folder to write: answers.jsonl, sft.jsonl, pairs.jsonl, manifest.json"""
    config: Annotated[KnowledgeConfig, tyro.conf.arg(name="")] = field(default_factory=KnowledgeConfig)
    """how it is asked and what is made of it"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when there is no question, or the model knows no answer."""
    options = read_options(Options, prog="plinth known", args=argv)
    from plinth.recipes.knowledge import make_knowledge_data

    manifest = make_knowledge_data(options.run, options.data, options.out, options.config, warn=say)
    emit(manifest, options.json, lambda console: show(console, manifest, options))
    return 0


def show(console: Console, manifest: dict[str, Any], options: Options) -> None:
    """Draw the counts and what comes next."""
    facts, over = manifest["facts"], manifest["refusals_over_the_bound"]
    lines = [
        f"{manifest['questions']} questions, {options.config.samples} answers each, {manifest['right_share']:.1%} of them right",
        "facts: " + ", ".join(f"{facts.get(split, 0)} {split}" for split in ("known", "between", "unknown")),
        f"{options.out}/sft.jsonl: " + ", ".join(f"{count} {kind}" for kind, count in manifest["sft_lines"].items()),
        f"{options.out}/pairs.jsonl: " + ", ".join(f"{count} {kind}" for kind, count in manifest["pairs"].items()),
    ]
    if any(over.values()):
        lines.append(f"left out, as refusals beyond max_refusal_share: {over['sft']} examples, {over['pairs']} pairs")
    lines.append(f"Next: plinth sft {options.run} --messages {options.out}/sft.jsonl --out RUN")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
