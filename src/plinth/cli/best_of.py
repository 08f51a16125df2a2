"""`plinth best-of`: the best of several answers to each prompt, as data to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.inference.endpoint import EndpointConfig
from plinth.posttraining.feedback_config import JudgeConfig, SelectionConfig


@dataclass(frozen=True)
class Options:
    """Draw several answers to each prompt, score them, and write the best as data for `plinth sft` (best of n, rejection sampling).

    With --n 1 a teacher writes answers for a student of any tokenizer.
    """

    data: Annotated[Path, tyro.conf.Positional]
    """prompts: rows of a prompt alone, or any format that `plinth inspect` reads, of which what stands before the last answer is taken"""
    out: Path
    """folder to write: sft.jsonl, answers.jsonl, pairs.jsonl, report.json, and asked.jsonl, from which an interrupted call goes on"""
    model: Path | None = None
    """run, build or model folder that writes the answers"""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """server that writes the answers, in the place of a folder"""
    judge: Path | None = None
    """run, build or model folder of the judge, for --by judge"""
    judge_endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """server of the judge, in the place of a folder"""
    judge_options: JudgeConfig = field(default_factory=JudgeConfig)
    """how the judge is asked"""
    principles: Path | None = None
    """constitution of the judge, a text file with one principle a line"""
    config: Annotated[SelectionConfig, tyro.conf.arg(name="")] = field(default_factory=SelectionConfig)
    """draws, scores and what is kept"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when there is no prompt, or nothing is kept."""
    options = read_options(Options, prog="plinth best-of", args=argv)
    from plinth.inference.local_model import LocalModel
    from plinth.recipes.feedback import open_model
    from plinth.recipes.selecting import select_answers

    judge = LocalModel.load(options.judge) if options.judge else None
    if options.judge_endpoint.url is not None:
        judge = open_model(options.judge, options.judge_endpoint)
    report = select_answers(
        open_model(options.model, options.endpoint), options.data, options.out, options.config,
        judge=judge, judge_config=options.judge_options, principles=options.principles, warn=say,
    )  # fmt: skip
    emit(report, options.json, lambda console: show(console, report, options))
    return 0


def show(console: Console, report: dict[str, Any], options: Options) -> None:
    """Draw what was kept and what it gained."""
    lines = [f"{report['sft_rows']} answers kept to {report['prompts_kept']} of {report['prompts']['count']} prompts"]
    if "gain" in report:
        low, high = report["gain"]["ci95"]
        lines.append(
            f"mean score {report['mean_score']['value']:.3f}, of the best of {options.config.n} {report['best_score']['value']:.3f}: "
            f"{report['gain']['value']:+.3f} ({low:+.3f} to {high:+.3f})"
        )
        lines += [f"  best of {row['n']}: {row['score']:.3f} at {row['kl_nats']:.2f} nats" for row in report["curve"]]
    lines.append(f"Next: plinth sft RUN --messages {options.out}/sft.jsonl --out NEW")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
