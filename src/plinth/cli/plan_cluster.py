"""`plinth plan --gpus N --model NAME`: a training run on a cluster on paper, before any accelerator is rented."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.config import UserError, save_json, to_dict
from plinth.scaling.cluster_config import ClusterConfig
from plinth.scaling.cluster_plan import ClusterPlan, make_cluster_plan
from plinth.scaling.cluster_show import print_cluster_plan


@dataclass(frozen=True)
class ClusterCommand:
    """Weigh the layouts of a model's training on a cluster, and show the fastest that fits with its memory, traffic, time and energy.

    Nothing is measured and no accelerator is needed. What the numbers rest on, and how far published runs differ: docs/cluster_planning.md.
    """

    options: Annotated[ClusterConfig, tyro.conf.arg(name="")]
    """the model, the cluster, and what the plan keeps to"""
    out: Path | None = None
    """also write the plan here, JSON"""
    json: bool = False
    """print one JSON object"""


def wants_cluster(argv: list[str]) -> bool:
    """Say whether the arguments of `plinth plan` name a cluster or a published model."""
    return any(word.split("=")[0] in ("--gpus", "--model") for word in argv)


def main(argv: list[str]) -> int:
    """Print a plan for a cluster; exit code 0 on success."""
    names = [word.split("=")[0] for word in argv]
    if not {"-h", "--help"} & set(names):
        for name, example in (("--gpus", "--gpus 1024"), ("--model", "--model llama-3-70b")):
            if name not in names:
                raise UserError(
                    f"a plan for a cluster needs {name}, for instance {example}. `plinth plan --gpus 8 --help` shows its options."
                )
    command = read_options(ClusterCommand, args=argv, prog="plinth plan", description=ClusterCommand.__doc__)
    plan = make_cluster_plan(command.options)
    result = plan_record(plan)
    if command.out is not None:
        save_json(command.out, result)
    emit(result, command.json, lambda console: print_cluster_plan(plan, console))
    return 0


def plan_record(plan: ClusterPlan) -> dict:
    """Return a plan as JSON values, with the totals that its parts add up to."""
    step = plan.chosen.step
    assert step is not None
    record = to_dict(plan)
    record["chosen"]["memory"] |= {"used": plan.chosen.memory.used, "total": plan.chosen.memory.total}
    record["chosen"]["step"] |= {"total_s": step.total_s, "exposed_s": step.exposed_s}
    for entry, option in zip(record["alternatives"], plan.alternatives):
        entry |= {"step_s": option.step_s, "runs_in_plinth": option.runs_in_plinth}
    return record
