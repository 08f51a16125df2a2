"""`plinth plan`: the compute-optimal model for a budget on this machine, before anything is trained."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import to_dict
from plinth.scaling.budget import parse_budget
from plinth.scaling.plan_config import PlanConfig


@dataclass(frozen=True)
class PlanCommand:
    """Measure this machine, weigh the runs that a budget allows, and show the one with the lowest predicted loss.

    For a cluster instead, on paper: `plinth plan --gpus 1024 --model llama-3-70b`; `plinth plan --gpus 1024 --help` shows its options.
    """

    paths: tyro.conf.Positional[tuple[str, ...]] = ("stdlib",)
    """files or folders of text; `stdlib` is the embedded default, the standard library of this Python"""
    budget: str = "4m"
    """training time (10m, 90s, 1h30m), FLOPs (3e14flops) or pretraining tokens (5e6tokens)"""
    instructions: bool | None = None
    """whether finetuning and preference tuning share the budget; unset: with the embedded default only"""
    options: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=PlanConfig)
    """choices that the plan keeps to"""
    out: Path | None = None
    """also write the plan here, JSON"""
    seed: int = 0
    """seed of the probe's random weights"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Print a plan for this machine, or with `--gpus` and `--model` for a cluster; exit code 0 on success."""
    from plinth.cli import plan_cluster

    if plan_cluster.wants_cluster(argv):
        return plan_cluster.main(argv)
    command = read_options(PlanCommand, args=argv, prog="plinth plan", description=PlanCommand.__doc__)
    budget = parse_budget(command.budget)  # a mistake here should not wait for the probe
    from plinth.scaling.plan import save_plan
    from plinth.scaling.show import print_plan

    plan = plan_paths(command.paths, budget, command.options, instructions=command.instructions, seed=command.seed)
    if command.out is not None:
        save_plan(plan, command.out)
    emit(to_dict(plan), command.json, lambda console: print_plan(plan, console))
    return 0


def plan_paths(paths, budget, options: PlanConfig, *, instructions: bool | None = None, seed: int = 0):
    """Return the plan for texts, not curated yet: their duplicates still count as text."""
    from plinth.data.sources import read_documents
    from plinth.scaling.corpus import describe_corpus
    from plinth.scaling.plan import make_plan

    started = time.perf_counter()
    say("reading the text")
    texts = read_documents(list(paths)).table.column("text").to_pylist()
    has_instructions = "stdlib" in map(str, paths) if instructions is None else instructions
    say("measuring vocabularies")
    corpus = describe_corpus(texts, has_instructions=has_instructions)
    probe = probe_here(seed=seed)
    plan = make_plan(budget, corpus, probe, options)
    say(f"planned in {time.perf_counter() - started:.1f} s")
    return plan


def probe_here(*, seed: int = 0):
    """Measure this machine with the project's own training step, saying on standard error what is measured."""
    from plinth.scaling.probe import probe_machine
    from plinth.training.device import choose_device
    from plinth.training.throughput import measure_tokens_per_s

    return probe_machine(measure_tokens_per_s, device=choose_device(), seed=seed, on_progress=lambda line: say(f"probing: {line}"))
