"""`plinth build`: from text and a budget to a served, aligned, evaluated model."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError
from plinth.scaling.budget import parse_budget
from plinth.scaling.plan_config import PlanConfig
from plinth.training.telemetry import TelemetryConfig


@dataclass(frozen=True)
class Options:
    """Curate, train a tokenizer, plan, pretrain, finetune, tune preferences, evaluate and report, within a budget."""

    text: tyro.conf.Positional[tuple[str, ...]] = ("stdlib",)
    """files and folders of text; `stdlib` is the embedded default, the standard library of this Python"""
    budget: str = "4m"
    """training time (10m, 90s, 1h30m), FLOPs (3e14flops) or pretraining tokens (5e6tokens)"""
    out: Path | None = None
    """directory of the build (default: runs/DATE_build)"""
    sft: Path | None = None
    """conversations to finetune on, JSON Lines of {"messages": [...]}; `stdlib` brings its own"""
    pairs: Path | None = None
    """preference pairs for DPO, JSON Lines of {"prompt", "chosen", "rejected"}; `stdlib` brings its own"""
    plan_only: bool = False
    """show the plan and stop before anything is trained; nothing is kept"""
    resume: bool = False
    """go on with the build in --out where it stopped; its saved configuration counts"""
    seed: int = 0
    """seed of every choice"""
    json: bool = False
    """answer with one JSON object on standard output"""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """choices that the plan keeps to"""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """where the metrics of the training stages go, and what energy costs"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth build", args=argv)
    parse_budget(options.budget)  # a mistake here should not wait for the imports
    if options.resume and options.out is None:
        raise UserError("--resume needs --out with the directory of the build to go on with.")
    from plinth.evaluation.report import report_card
    from plinth.recipes.build_run import BuildConfig
    from plinth.recipes.lifecycle import build

    config = BuildConfig(
        text=options.text,
        budget=options.budget,
        sft=options.sft,
        pairs=options.pairs,
        plan=options.plan,
        seed=options.seed,
        telemetry=options.telemetry,
    )
    if options.plan_only:
        return show_plan_only(config, argv, options.json)
    out = options.out or Path("runs") / time.strftime("%Y-%m-%d_build")
    data = build(out, config, resume=options.resume, argv=["plinth", "build", *argv], say=say, show_plan=draw_plan)

    def render(console) -> None:
        console.print(report_card(out, data=data))
        console.print(f"\nreport  {out / 'report.html'}", markup=False)
        console.print(f"chat    {own_command()} serve {out}   then open http://127.0.0.1:8000", markup=False)

    emit(data, options.json, render)
    return 0


def own_command() -> str:
    """Return how this command is called from here: by its name if the shell finds it, else by its path."""
    return "plinth" if shutil.which("plinth") or not sys.argv[0].endswith("plinth") else os.path.relpath(sys.argv[0])


def show_plan_only(config, argv: list[str], as_json: bool) -> int:
    """Curate and plan in a temporary directory and print the plan."""
    from plinth.recipes.lifecycle import build
    from plinth.scaling.plan_record import load_plan
    from plinth.scaling.show import print_plan

    with tempfile.TemporaryDirectory() as folder:
        result = build(Path(folder) / "plan", config, argv=argv, say=say, plan_only=True)
        plan = load_plan(Path(folder) / "plan" / "plan.json")
    emit(result, as_json, lambda console: print_plan(plan, console))
    return 0


def draw_plan(plan) -> None:
    """Show the plan on standard error before it starts."""
    from rich.console import Console

    from plinth.scaling.show import print_plan

    print_plan(plan, Console(stderr=True))
