"""The directory of a build: what it is made from, which stages are done, how long each took."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plinth.config import UserError, from_dict, to_dict
from plinth.data.curate import CurateConfig
from plinth.energy import EnergyMeter
from plinth.evaluation.run import EvaluationConfig
from plinth.run import Run
from plinth.scaling.budget import parse_budget
from plinth.scaling.plan_config import PlanConfig
from plinth.training.device import choose_device, peak_memory_bytes
from plinth.training.telemetry import TelemetryConfig, gpu_ids

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
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """where the metrics of the training stages go, and what energy costs"""
    seed: int = 0
    """seed of every choice"""

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        for path in (self.sft, self.pairs):
            if path is not None and not path.exists():
                raise UserError(f"{path} does not exist.")

    @property
    def stage_telemetry(self) -> TelemetryConfig:
        """The telemetry of the training stages; power and price that only the plan was told count here too."""
        given, plan = self.telemetry, self.plan
        return replace(
            given,
            watts_per_core=plan.watts_per_core if given.watts_per_core == TelemetryConfig.watts_per_core else given.watts_per_core,
            price_per_hour=(plan.price_per_hour or None) if given.price_per_hour is None else given.price_per_hour,
        )

    @property
    def own_facts(self) -> bool:
        """Whether the text brings its own questions: the standard library does, unless others are named."""
        return STDLIB in self.text and self.sft is None


def open_build(
    out: Path, config: BuildConfig, resume: bool, argv: list[str] | None, say: Callable[[str], None]
) -> tuple[BuildConfig, Stages]:
    """Create a build's directory, or open it again; a resumed build keeps the configuration it began with."""
    if not resume:
        config.telemetry.check()
        run = Run.create(out, "build", to_dict(config), argv=argv, seed=config.seed)
    else:
        run = Run.open(out)
        config = from_dict(BuildConfig, run.config, f"{out}/config.json: ")
    return config, Stages(run, say, config.stage_telemetry, resumed=resume)


class Stages:
    """Runs the stages of a build that are still needed, and writes seconds and joules of each into metrics.jsonl."""

    def __init__(self, run: Run, say: Callable[[str], None], telemetry: TelemetryConfig, resumed: bool):
        self.run, self.say, self.telemetry, self.resumed = run, say, telemetry, resumed

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[Path], bool]]:
        """Time a stage. Gives a function that says whether the stage's product is still missing.

        An error leaves FAILED.txt; a user's mistake found before there is a plan takes the new directory away again.
        """
        cores, started = self.run.provenance["hardware"]["cores"], time.perf_counter()
        meter = EnergyMeter(cores, self.telemetry.watts_per_core, gpus=gpu_ids(choose_device())).start()
        self.say(f"{name} ...")
        try:
            yield lambda product: not product.exists()
        except BaseException as error:
            self._fail(name, error)
            raise
        finally:
            energy = meter.read()
            meter.close()
        seconds = time.perf_counter() - started
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
