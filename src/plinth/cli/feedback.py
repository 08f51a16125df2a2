"""`plinth feedback`: a judge says which of two answers is better, as a probability, asked in both orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.inference.endpoint import EndpointConfig
from plinth.posttraining.feedback_config import FeedbackConfig


@dataclass(frozen=True)
class Options:
    """Let a judge compare answers in both orders; write preference pairs with soft labels, and how far the judge can be trusted."""

    answers: Annotated[Path, tyro.conf.Positional]
    """pairs or rankings in any format that `plinth inspect` reads, or rows of a prompt with several completions (`plinth best-of`)"""
    out: Path
    """folder to write: pairs.jsonl, report.json, and asked.jsonl, from which an interrupted call goes on"""
    judge: Path | None = None
    """run, build or model folder of the judge"""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """server of the judge, in the place of a folder"""
    config: Annotated[FeedbackConfig, tyro.conf.arg(name="")] = field(default_factory=FeedbackConfig)
    """how it is asked"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when there is nothing to judge, or the judge decides nothing."""
    options = read_options(Options, prog="plinth feedback", args=argv)
    from plinth.recipes.feedback import make_feedback, open_model

    report = make_feedback(options.answers, open_model(options.judge, options.endpoint), options.out, options.config, say)
    emit(report, options.json, lambda console: show(console, report, options.out))
    return 0


def show(console: Console, report: dict[str, Any], out: Path) -> None:
    """Draw the report and what comes next."""
    lines = [
        f"{report['pairs']} pairs judged, {report['written']} written; {report['undecided']} undecided, {report['unsure']} unsure",
        f"the same position wins in both orders: {share(report['position_bias'])}; the same answer: {share(report['swap_consistency'])}",
    ]
    if "kappa" in report:
        kappa = report["kappa"]
        low, high = kappa["ci95"]
        lines.append(f"agreement with the file's labels: {share(report['agreement'])}, kappa {kappa['value']:.2f} ({low:.2f}–{high:.2f})")
    lines.append(f"Next: plinth prefer RUN --pairs {out}/pairs.jsonl --loss cdpo --out NEW")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def share(score: dict[str, Any]) -> str:
    """Return a share with its 95 % interval."""
    low, high = score["ci95"]
    return f"{score['value']:.1%} ({low:.1%}–{high:.1%})"
