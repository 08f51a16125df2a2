"""The directory of a build: what it is made from, which stages are done, how long each took."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plinth.config import UserError, from_dict, to_dict
from plinth.data.curate import CurateConfig
from plinth.energy import EnergyMeter
from plinth.evaluation.run import EvaluationConfig
from plinth.run import Run
from plinth.scaling.budget import parse_budget
from plinth.scaling.plan_config import PlanConfig
from plinth.training.device import peak_memory_bytes

STDLIB = "stdlib"


@dataclass(frozen=True)
class BuildConfig:
    """What to build and from what."""

    text: tuple[str, ...] = (STDLIB,)
    """files and folders of text; `stdlib` is the standard library of this Python"""
    budget: str = "4m"
    """training time (10m, 90s, 1h30m), FLOPs (3e14flops) or pretraining tokens (5e6tokens)"""
    sft: Path | None = None
    """conversations to finetune on, JSON Lines; `stdlib` brings its own"""
    pairs: Path | None = None
    """preference pairs for DPO, JSON Lines; `stdlib` brings its own"""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """what is dropped and what is held out"""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """choices that the plan keeps to"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """how much is evaluated"""
    seed: int = 0
    """seed of every choice"""

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        for path in (self.sft, self.pairs):
            if path is not None and not path.exists():
                raise UserError(f"{path} does not exist.")

    @property
    def own_facts(self) -> bool:
        """Whether the text brings its own questions: the standard library does, unless others are named."""
        return STDLIB in self.text and self.sft is None


def open_build(
    out: Path, config: BuildConfig, resume: bool, argv: list[str] | None, say: Callable[[str], None]
) -> tuple[BuildConfig, Stages]:
    """Create a build's directory, or open it again; a resumed build keeps the configuration it began with."""
    if not resume:
        return config, Stages(Run.create(out, "build", to_dict(config), argv=argv, seed=config.seed), say, resumed=False)
    run = Run.open(out)
    return from_dict(BuildConfig, run.config, f"{out}/config.json: "), Stages(run, say, resumed=True)


class Stages:
    """Runs the stages of a build that are still needed, and writes seconds and joules of each into metrics.jsonl."""

    def __init__(self, run: Run, say: Callable[[str], None], resumed: bool):
        self.run, self.say, self.resumed = run, say, resumed

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[Path], bool]]:
        """Time a stage. Gives a function that says whether the stage's product is still missing.

        An error leaves FAILED.txt; a user's mistake found before there is a plan takes the new directory away again.
        """
        meter, started = EnergyMeter(self.run.provenance["hardware"]["cores"]).start(), time.perf_counter()
        self.say(f"{name} ...")
        try:
            yield lambda product: not product.exists()
        except BaseException as error:
            self._fail(name, error)
            raise
        energy, seconds = meter.read(), time.perf_counter() - started
        self.run.log(stage=name, time_s=seconds, energy_j=energy.joules, energy_source=energy.source, peak_memory_bytes=peak_memory_bytes())
        self.say(f"{name} done in {seconds:.1f} s")

    def _fail(self, name: str, error: BaseException) -> None:
        if isinstance(error, UserError) and not self.resumed and not (self.run.path / "plan.json").exists():
            shutil.rmtree(self.run.path)
            return
        with contextlib.suppress(OSError):  # on a full disk the reason cannot be written down either
            self.run.fail(f"{name}: {error or type(error).__name__}")

    def options(self, name: str) -> dict[str, Any]:
        """Return how a training stage goes on: resumed when it was begun before."""
        begun = (self.run.path / name / "config.json").exists()
        return {"resume": begun, "argv": self.run.provenance["argv"], "warn": self.say}

    def finish(self) -> None:
        """Mark the build as done, with seconds and joules over all its stages."""
        records = self.run.metrics()
        totals = {key: sum(record[key] for record in records) for key in ("time_s", "energy_j")}
        self.run.finish({**totals, "peak_memory_bytes": peak_memory_bytes(), "energy_source": records[-1]["energy_source"]})
