"""`plinth reward`: a reward model from pairs or rankings of answers, with a report on held-out ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.posttraining.reward_config import RewardTuning

NAMES = {"length": "length alone", "words": "bag of words", "coin": "coin"}


@dataclass(frozen=True)
class Options:
    """Train a reward model on pairs or rankings of answers, and report on held-out ones beside simple baselines."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder to start from: a decoder, or a reward model"""
    data: Path
    """pairs or rankings, in any format that `plinth inspect` reads as preference or ranking"""
    out: Path
    """run directory to write"""
    held_out: Path | None = None
    """pairs or rankings to report on (default: the tail of the data, --held-out-share)"""
    references: Path | None = None
    """conversations whose scores are normalised (default: the best answers of the data)"""
    config: Annotated[RewardTuning, tyro.conf.arg(name="")] = field(default_factory=RewardTuning)
    """loss, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth reward", args=argv)
    from plinth.recipes.reward import make_reward_model

    run = make_reward_model(
        options.out, options.run, options.data, options.config,
        held_out=options.held_out, references=options.references, resume=options.resume, argv=argv, warn=say,
    )  # fmt: skip
    summary = {"path": str(run.path), "model": str(run.model_dir), **(run.summary or {})}

    def render(console: Console) -> None:
        console.print(
            f"{run.path}: {summary['steps']:,} steps on {summary['prompts']:,} prompts in {summary['time_s']:.0f} s, "
            f"training loss {summary['loss_nats']:.3f}.", markup=False, highlight=False,
        )  # fmt: skip
        if "held_out" in summary:
            show_report(console, summary["held_out"])
        console.print(f"Next: plinth reward score {run.path} --data FILE", markup=False, highlight=False)

    emit(summary, options.json, render)
    return 0


def show_report(console: Console, report: dict[str, Any]) -> None:
    """Draw the accuracies with their intervals, the calibration, and the sentence that sums up."""
    table = Table("judge", "right", "95 % interval", "the model is ahead by")
    table.add_row("reward model", *_cells(report["accuracy"]), "")
    for name, found in report["baselines"].items():
        table.add_row(NAMES[name], *_cells(found["accuracy"]), "{} [{}]".format(*_cells(found["ahead"], "+")))
    console.print(table)
    calibration, rest = report["calibration"], report["calibration"]["rest"]
    console.print(
        f"{report['pairs']:,} pairs of {report['prompts']:,} prompts; {report['ties']} ties, which count half. Calibration error "
        f"{calibration['ece']:.3f}; temperature {calibration['temperature']:.2f}, fitted on one half, takes the other's from "
        f"{rest['ece']:.3f} to {rest['ece_with_temperature']:.3f}.",
        markup=False, highlight=False,
    )  # fmt: skip
    console.print(report["verdict"], markup=False, highlight=False)


def _cells(score: dict[str, Any], sign: str = "") -> tuple[str, str]:
    """Return a share and its interval; an end that a single prompt leaves unknown is a question mark."""
    value, *ends = ("?" if number is None else f"{number:{sign}.1%}" for number in (score["value"], *score["ci95"]))
    return value, " to ".join(ends)
