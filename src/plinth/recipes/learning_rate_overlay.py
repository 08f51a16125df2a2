"""The learning-rate overlay: loss after training against the learning rate, one curve a size, a panel a parametrisation.

Where rates transfer, the curves have their lowest points above each other. Every point is a training run of its own and is kept
in a file of its own, so the experiment can be stopped, widened, and shared by several processes.
Source: Yang et al. 2022, arXiv:2203.03466, figure 1; for depth Dey et al. 2025, arXiv:2505.01618, figure 3.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plinth.config import UserError, read_json, save_json, to_dict, write_atomic
from plinth.evaluation.panels import Line, Panel, panels_svg
from plinth.recipes.coordinate_check import MUON_FACTOR
from plinth.recipes.transfer import (
    Along,
    Family,
    Learner,
    Size,
    Text,
    compared,
    locked,
    open_text,
    ordered,
    say_time,
    seconds_a_step,
    threads,
    varied,
)
from plinth.run import Progress, installed_versions
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig
from plinth.training.schedule import warmup_stable_decay
from plinth.training.step import NonFiniteError, Workers, open_workers
from plinth.training.transfer import Name


@dataclass(frozen=True)
class OverlayConfig:
    """Which models are trained, at which learning rates, and how long."""

    family: Family = field(default_factory=Family)
    """the decoders"""
    along: Along = "width"
    """which size varies; the other stays at its base"""
    widths: tuple[int, ...] = (64, 128, 256)
    """hidden sizes (along width)"""
    depths: tuple[int, ...] = (2, 4, 8)
    """numbers of layers (along depth)"""
    parametrizations: tuple[Name, ...] | None = None
    """which are compared (default: standard and mup along width, mup and completep along depth)"""
    log2_lrs: tuple[int, ...] = (-11, -10, -9, -8, -7, -6, -5)
    """learning rates at the base size, as powers of two; AdamW's, Muon's is five times as much"""
    steps: int = 100
    """updates of each run; a tenth is warmup, the last half decay"""
    heldout_rows: int = 64
    """held-out sequences that the final loss is taken on"""

    def __post_init__(self) -> None:
        if self.steps < 10 or self.heldout_rows < 1:
            raise UserError(f"steps={self.steps} must be at least 10 and heldout_rows={self.heldout_rows} at least 1.")
        list(ordered(self.log2_lrs, "log2_lrs"))
        for size in self.sizes:
            self.family.decoder(size.width, size.depth, 16)

    @property
    def names(self) -> tuple[Name, ...]:
        return compared(self.along, self.parametrizations)

    @property
    def sizes(self) -> list[Size]:
        return varied(self.family, self.along, self.widths, self.depths)

    @property
    def points(self) -> list[Point]:
        """Return the runs, each once: parametrisations that are the same at a size share theirs."""
        lrs = sorted(set(self.log2_lrs))
        return list(dict.fromkeys(self.point(name, size, lr) for size in self.sizes for name in self.names for lr in lrs))

    def point(self, name: Name, size: Size, log2_lr: int) -> Point:
        return Point(self.family.simplest(name, size), size, log2_lr)


@dataclass(frozen=True)
class Point:
    """One training run of the experiment."""

    parametrization: Name
    size: Size
    log2_lr: int

    @property
    def file_name(self) -> str:
        return f"{self.parametrization}_width{self.size.width}_depth{self.size.depth}_lr2^{self.log2_lr}.json"


class Points:
    """The folder of finished points; each is trained once, whatever number of processes share the folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Open or make the folder. Raises UserError when it holds points of other settings."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            if not (folder / "settings.json").exists():
                save_json(folder / "settings.json", settings | {"versions": installed_versions()})
        found = read_json(folder / "settings.json")
        differing = [name for name, value in settings.items() if found.get(name) != value]
        if differing:
            name = differing[0]
            raise UserError(
                f"{folder} holds points with {name}={found.get(name)!r}, and this is {settings[name]!r}. "
                "Pass the same options, or --out with a new name."
            )

    def get(self, point: Point) -> dict[str, Any] | None:
        """Return a finished point's record."""
        path = self.folder / point.file_name
        return read_json(path) if path.exists() else None

    def fill(self, point: Point, train: Callable[[Point], dict[str, Any]], *, wait: bool) -> bool:
        """Train a point unless it is finished or another process is at it (with `wait`: that process is awaited); True when done here."""
        if self.get(point) is not None:
            return False
        with locked(self.folder / f".{point.file_name}.lock", wait=wait) as held:
            if not held or self.get(point) is not None:
                return False
            save_json(self.folder / point.file_name, train(point))
            return True


def settings_of(config: OverlayConfig, text: Text) -> dict[str, Any]:
    """Return what all points of a folder share; sizes, learning rates and parametrisations may be added later."""
    return {**to_dict(config.family), "steps": config.steps, "heldout_rows": config.heldout_rows, "shards_sha256": text.sha256}


def train_point(config: OverlayConfig, point: Point, text: Text, workers: Workers) -> dict[str, Any]:
    """Train one model and return its record; the held-out loss is None when the run diverged."""
    lr = 2.0**point.log2_lr
    rates = OptimizerConfig(name=config.family.optimizer, lr=lr, muon_lr=MUON_FACTOR * lr)
    learner = Learner(config.family, point.size, text.vocab_size, point.parametrization, rates, config.family.seed, workers)
    started = time.perf_counter()
    loss: float | None = None
    with contextlib.suppress(NonFiniteError):
        for step in range(config.steps):
            scale = warmup_stable_decay(step, steps=config.steps, warmup_steps=max(1, config.steps // 10), decay_steps=config.steps // 2)
            learner.step(text.train.batch(step), scale)
        with torch.no_grad():
            loss_sum, count, _ = causal_lm_loss(learner.masters.model, text.heldout.rows(0, config.heldout_rows))
        loss = float(loss_sum) / count if math.isfinite(float(loss_sum)) else None
    seconds = round(time.perf_counter() - started, 3)
    return {**to_dict(point.size), "parametrization": point.parametrization, "lr": lr, "loss_nats": loss, "time_s": seconds}


def overlay(shards: Path | None, out: Path, config: OverlayConfig, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Train what is missing in the folder `out`, draw it, and return the summary; says beforehand how long it takes."""
    text = open_text(shards, out, config.family, say)
    points = Points(out / "points", settings_of(config, text))
    missing = [point for point in config.points if points.get(point) is None]
    with open_workers(threads(config.family)) as workers, Progress(len(missing), "learning-rate overlay", unit="run") as progress:
        if missing:
            sizes = [size for size in config.sizes if any(point.size == size for point in missing)]
            seconds = seconds_a_step(config.family, sizes, text.vocab_size, text.train.batch(0), workers)
            expected = sum(seconds[point.size] for point in missing) * config.steps
            say(f"{len(missing)} of {len(config.points)} runs of {config.steps} updates are to do: about {say_time(expected)}")
        for wait in (False, True):  # first what nobody is at, then what others left unfinished
            for point in config.points:
                if points.fill(point, lambda one: train_point(config, one, text, workers), wait=wait):
                    progress.update()
    result = summarise(config, points) | {"picture": str(out / "overlay.svg"), "data": str(out / "overlay.json")}
    write_atomic(out / "overlay.svg", picture(result, y_top=math.log(text.vocab_size)))
    save_json(out / "overlay.json", result)
    return result


def summarise(config: OverlayConfig, points: Points) -> dict[str, Any]:
    """Return losses, optima, and how far the optimum moves, per parametrisation."""
    lrs = sorted(set(config.log2_lrs))
    results = {}
    for name in config.names:
        losses = [[(points.get(config.point(name, size, lr)) or {})["loss_nats"] for lr in lrs] for size in config.sizes]
        optima = [optimum(lrs, row) for row in losses]
        base = optima[0]
        results[name] = {
            "loss_nats": losses,
            "optimum_log2_lr": [one["log2_lr"] for one in optima],
            "optimum_at_edge": [one["at_edge"] for one in optima],
            "shift_octaves": [_difference(one["log2_lr"], base["log2_lr"]) for one in optima],
            "transfer_cost_nats": [transfer_cost(row, base["index"]) for row in losses],
        }
    return {
        "along": config.along,
        "sizes": [size.width if config.along == "width" else size.depth for size in config.sizes],
        "log2_lrs": lrs,
        "steps": config.steps,
        "tokens": config.steps * config.family.sequences_per_step * config.family.seq_len,
        "optimizer": config.family.optimizer,
        "parametrizations": results,
    }


def optimum(log2_lrs: list[int], losses: list[float | None]) -> dict[str, Any]:
    """Return the learning rate of the lowest loss: the vertex of the parabola through the lowest point and its neighbours.

    At the edge of the range, or beside a diverged run, it is the lowest point itself; None when all runs diverged.
    """
    finite = [i for i, loss in enumerate(losses) if loss is not None]
    if not finite:
        return {"log2_lr": None, "index": None, "at_edge": True}
    best = min(finite, key=lambda i: losses[i] or 0.0)
    if best - 1 not in finite or best + 1 not in finite:
        return {"log2_lr": float(log2_lrs[best]), "index": best, "at_edge": best in (0, len(losses) - 1)}
    (x0, x1, x2), (y0, y1, y2) = log2_lrs[best - 1 : best + 2], losses[best - 1 : best + 2]
    a, b = (y0 - y1) / (x0 - x1), (y1 - y2) / (x1 - x2)  # slopes of the two chords, at their middles
    vertex = x1 if a == b else (x0 + x1) / 2 - a * ((x2 - x0) / 2) / (b - a)
    return {"log2_lr": round(float(vertex), 3), "index": best, "at_edge": False}


def transfer_cost(losses: list[float | None], base_index: int | None) -> float | None:
    """Return what the base size's best learning rate costs here: its loss above the lowest; None when it diverged."""
    if base_index is None or losses[base_index] is None:
        return None
    return losses[base_index] - min(loss for loss in losses if loss is not None)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a - b, 3)


def picture(result: dict[str, Any], y_top: float) -> str:
    """Draw loss against learning rate, a panel a parametrisation, the lowest point of each curve marked; returns an SVG file."""
    lrs = [2.0**x for x in result["log2_lrs"]]
    panels = []
    for name, found in result["parametrizations"].items():
        lines = []
        for i, (size, losses) in enumerate(zip(result["sizes"], found["loss_nats"])):
            values = [math.inf if loss is None else loss for loss in losses]
            best = min(range(len(lrs)), key=values.__getitem__)
            colour = 1 + i if len(result["sizes"]) <= 5 else 1 + i * 5 // len(result["sizes"])
            lines.append(Line(f"{result['along']} {size}", lrs, values, colour, best=(lrs[best], values[best])))
        shift = found["shift_octaves"][-1]
        note = "the widest or deepest diverged" if shift is None else f"optimum moves by a factor of 2^{shift:+.1f}"
        panels.append(Panel(name, note, lines, None if shift is None else abs(shift) <= 0.5))
    title = f"Loss after {result['tokens'] / 1e3:,.0f} k tokens against the learning rate, {result['optimizer']}"
    ticks = [(lr, f"2^{x}") for lr, x in zip(lrs, result["log2_lrs"])]
    labels = {"x_label": "learning rate at the base size", "y_label": "held-out loss, nats a token"}
    return panels_svg(panels, title=title, x_ticks=ticks, y_top=y_top, **labels)
