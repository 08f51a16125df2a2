"""What there is to say of a run or a build at this moment, as one plain dictionary: the terminal, the page and --json show it."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from plinth.config import UserError, read_json
from plinth.run import MODEL_STAGES, Run
from plinth.watch.metrics import MetricsFile, smooth, thin

TRAINING_STAGES = tuple(reversed(MODEL_STAGES))
FIRST_CHARTS = ("loss_nats", "tokens_per_s", "grad_norm", "lr")
OWN_FIELDS = {*FIRST_CHARTS, "step", "time_s", "tokens", "energy_kwh", "cost", "co2_g"}  # the others are the objective's metrics
SMOOTHED = ("loss_nats", "grad_norm", "tokens_per_s", "accuracy", "margin")
RECENT = 20  # steps behind the numbers that are shown as now
MAX_INCIDENTS = 50
QUIET_S, QUIET_STEPS = 30.0, 20.0


class Watcher:
    """Follows one run, or the training stages of one build; files that are not there yet may come later."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._files: dict[Path, MetricsFile] = {}
        self._plans: dict[Path, tuple[float, dict[str, Any] | None]] = {}

    def poll(self, stage: str | None = None) -> str:
        """Read what is new of a stage; return a text that differs when there is something new to show."""
        run = self._run(stage)
        metrics = self._metrics(run)
        metrics.poll()
        marks = [(run.path / name).exists() for name in ("config.json", "DONE", "FAILED.txt")]
        build = [(name, self._stage_state(name)) for name in TRAINING_STAGES] if self.is_build else []
        return f"{run.path}:{metrics.version}:{marks}:{build}:{(self.path / 'DONE').exists()}"

    @property
    def is_build(self) -> bool:
        return any((self.path / name / "config.json").exists() for name in TRAINING_STAGES) or _stage_of(self.path) == "build"

    def state(self, stage: str | None = None) -> dict[str, Any]:
        """Return everything but the curves; every number may be None while it is not known yet."""
        self.poll(stage)
        run = self._run(stage)
        metrics = self._metrics(run)
        config = _json(run.path / "config.json")
        steps = _table(config.get("train")).get("steps")
        step = int(metrics.last("step") or 0)
        step_s = _step_s(metrics)
        status, message = self._status(run, metrics, step_s)
        summary = _json(run.path / "DONE")
        return {
            "path": str(self.path),
            "name": self.path.resolve().name,
            "stage": _stage_of(run.path),
            "stages": self._stages(),
            "status": status,
            "message": message,
            "step": step,
            "steps": steps,
            "step_s": step_s,
            "eta_s": (steps - step) * step_s if status == "running" and steps and step_s else None,
            "tokens": _whole(metrics.last("tokens")),
            "time_s": summary.get("time_s") or metrics.last("time_s"),
            "loss_nats": _mean(metrics.recent("loss_nats", RECENT)),
            "tokens_per_s": _median(metrics.recent("tokens_per_s", RECENT)),
            "mfu": _median(metrics.recent("mfu", RECENT)),
            "grad_norm": _median(metrics.recent("grad_norm", RECENT)),
            "lr": metrics.last("lr"),
            "energy_kwh": summary.get("energy_kwh") or metrics.last("energy_kwh"),
            "energy_source": summary.get("energy_source") or metrics.texts.get("energy_source"),
            "cost": summary.get("cost", metrics.last("cost")),
            "co2_g": summary.get("co2_g", metrics.last("co2_g")),
            "predicted": self._predicted(run),
            "num_incidents": len(metrics.incidents),
            "num_skipped": metrics.num_skipped,
            "incidents": [_incident(record) for record in metrics.incidents[-MAX_INCIDENTS:]],
        }

    def curves(self, stage: str | None = None, first: float = -math.inf, last: float = math.inf, limit: int = 600) -> dict[str, Any]:
        """Return {name: {x, y, smooth}} of the steps from `first` to `last`, each thinned to about `limit` points.

        The names are loss_nats, tokens_per_s, grad_norm, lr, mfu, and what else the objective logs.
        """
        metrics = self._metrics(self._run(stage))
        metrics.poll()
        steps = metrics.column("step")
        chosen = (steps >= first) & (steps <= last)
        names = [name for name in (*FIRST_CHARTS, *metrics.names) if name in FIRST_CHARTS or name not in OWN_FIELDS]
        return {name: _curve(steps[chosen], metrics.column(name)[chosen], name in SMOOTHED, limit) for name in dict.fromkeys(names)}

    def _run(self, stage: str | None) -> Run:
        """Return the run of the stage asked for, of a build's newest training stage, or the run itself."""
        if stage in TRAINING_STAGES and (self.path / stage / "config.json").exists():
            return Run(self.path / stage)
        begun = [name for name in TRAINING_STAGES if (self.path / name / "config.json").exists()]
        return Run(self.path / begun[-1]) if begun else Run(self.path)

    def _metrics(self, run: Run) -> MetricsFile:
        path = run.path / "metrics.jsonl"
        return self._files.setdefault(path, MetricsFile(path))

    def _status(self, run: Run, metrics: MetricsFile, step_s: float | None) -> tuple[str, str]:
        """Return (waiting | running | quiet | stopped | failed | done, why)."""
        if not (run.path / "config.json").exists():
            return "waiting", f"{self.path} holds no run yet."
        if run.is_done:
            return "done", "" if not self.is_build or (self.path / "DONE").exists() else "The build goes on."
        for place in (run.path, self.path):
            if (text := _failure(place / "FAILED.txt", metrics.path)) is not None:
                return "failed", text
        last = metrics.incidents[-1] if metrics.incidents else None
        if last is not None and last.get("action") == "stop" and last["step"] > (metrics.last("step") or 0):
            return "stopped", f"Stopped before update {last['step']}: {last.get('reason', '')} {last.get('documents', '')}"
        if metrics.num_steps == 0:
            return "running", "No step is finished yet."
        with contextlib.suppress(OSError):
            age_s = time.time() - metrics.path.stat().st_mtime
            if age_s > max(QUIET_S, QUIET_STEPS * (step_s or 0.0)):
                return "quiet", "No step for a while: the process may have ended. plinth's --resume goes on from the newest checkpoint."
        return "running", ""

    def _stage_state(self, name: str) -> str:
        run = Run(self.path / name)
        return "done" if run.is_done else "begun" if (run.path / "config.json").exists() else "to come"

    def _stages(self) -> list[dict[str, Any]]:
        """Return the stages of a build that are done, with seconds and joules, and the training stages that were begun."""
        if not self.is_build:
            return []
        found: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError):
            for record in Run(self.path).metrics():
                if record.get("stage"):
                    entry = found.setdefault(record["stage"], {"name": record["stage"], "state": "done", "time_s": 0.0, "energy_j": 0.0})
                    entry["time_s"] += record.get("time_s") or 0.0
                    entry["energy_j"] += record.get("energy_j") or 0.0
        for name in TRAINING_STAGES:
            if name not in found and self._stage_state(name) != "to come":
                found[name] = {"name": name, "state": self._stage_state(name), "time_s": None, "energy_j": None}
        return list(found.values())

    def _predicted(self, run: Run) -> dict[str, Any] | None:
        """Return what the plan beside a pretraining run predicts, or None when there is no plan that can be read."""
        if _stage_of(run.path) != "pretrain":
            return None
        for path in (run.path / "plan.json", run.path.parent / "plan.json"):
            with contextlib.suppress(OSError):
                changed = path.stat().st_mtime
                if path not in self._plans or self._plans[path][0] != changed:
                    self._plans[path] = changed, _read_prediction(path)
                return self._plans[path][1]
        return None


def _read_prediction(path: Path) -> dict[str, Any] | None:
    # imported here because reading a plan imports torch, which takes seconds that a run without a plan need not wait
    from plinth.scaling.curve import predicted_curve
    from plinth.scaling.plan_record import load_plan

    try:
        plan = load_plan(path)
    except UserError:  # of another version
        return None
    curve = predicted_curve(plan)
    return {
        "loss_nats": plan.predicted.loss_nats,
        "law": plan.laws[0].law if plan.laws else "",
        "time_s": plan.predicted.time_s,
        "tokens_per_s": plan.predicted.tokens_per_s,
        "mfu": plan.predicted.mfu,
        "x": [round(tokens / plan.tokens * plan.steps, 2) for tokens, _ in curve],
        "y": [round(loss, 4) for _, loss in curve],
    }


def _curve(x: np.ndarray, y: np.ndarray, smoothed: bool, limit: int) -> dict[str, list[list[float]]]:
    """Return {raw: [x, y], smooth: [x, y]} thinned; `smooth` is left out for few points."""
    finite = np.isfinite(y)
    curve = {"raw": _numbers(*thin(x[finite], y[finite], limit))}
    if smoothed and finite.sum() > 40:
        curve["smooth"] = _numbers(*thin(x[finite], smooth(y[finite], int(finite.sum()) // 25), limit // 2))
    return curve


def _numbers(x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    return [x.tolist(), [float(f"{value:.6g}") for value in y.tolist()]]


def _failure(file: Path, metrics: Path) -> str | None:
    """Return why a run failed, unless steps were logged since: a resumed run keeps the text until it is done."""
    with contextlib.suppress(OSError):
        if not metrics.exists() or metrics.stat().st_mtime <= file.stat().st_mtime:
            return file.read_text(encoding="utf-8", errors="replace").strip()
    return None


def _incident(record: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "event", "action", "reason", "documents", "loss_nats", "grad_norm")
    return {name: record.get(name) for name in names}


def _stage_of(path: Path) -> str | None:
    return _json(path / "provenance.json").get("stage")


def _json(path: Path) -> dict[str, Any]:
    try:
        return _table(read_json(path))
    except (UserError, OSError):
        return {}


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _step_s(metrics: MetricsFile) -> float | None:
    times = np.array(metrics.recent("time_s", 50))
    return float(np.median(np.diff(times))) if len(times) > 2 else None


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
