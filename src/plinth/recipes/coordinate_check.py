"""The coordinate check: do activations move by the same amount at every width (or depth) after a few real updates?

A parametrisation that transfers learning rates moves each activation by an amount that does not depend on the size: the line
over the sizes is flat. One that does not shows lines that rise (it will diverge when it grows) or fall (it stops learning).
Source: Yang et al. 2022, arXiv:2203.03466, appendix D.1; for depth Dey et al. 2025, arXiv:2505.01618, figure 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from plinth.config import UserError, save_json, write_atomic
from plinth.evaluation.panels import Line, Panel, panels_svg
from plinth.models.transformer import Transformer
from plinth.recipes.transfer import Along, Family, Learner, Size, compared, open_text, say_time, seconds_a_step, threads, varied
from plinth.run import Progress
from plinth.training.optim import OptimizerConfig
from plinth.training.step import Batch, Workers, open_workers
from plinth.training.transfer import Name

QUANTITIES = ("embedding", "first attention", "first feed-forward", "last attention", "last feed-forward", "stream", "logits")
MEASURE_STEPS = 3  # making a model and measuring it take about as long as so many updates
MUON_FACTOR = 5.0  # Muon's learning rate over AdamW's, as in the defaults of OptimizerConfig


@dataclass(frozen=True)
class CoordinateConfig:
    """What is trained, how far, and when a line counts as flat."""

    family: Family = field(default_factory=lambda: Family(seq_len=64, sequences_per_step=4))
    """the decoders"""
    along: Along = "width"
    """which size varies; the other stays at its base"""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """hidden sizes checked (along width)"""
    depths: tuple[int, ...] = (2, 4, 8, 16)
    """numbers of layers checked (along depth)"""
    parametrizations: tuple[Name, ...] | None = None
    """which are checked (default: standard and mup along width, mup and completep along depth)"""
    steps: int = 4
    """updates, on one batch, before the activations are compared with the initial ones"""
    lr: float = 0.002
    """AdamW's learning rate at the base size; Muon's is five times as much"""
    seeds: int = 3
    """models of each size, averaged"""
    rise: float = 0.35
    """largest slope of log(change) over log(size) that counts as flat"""
    fall: float = 0.45
    """largest slope downwards that does; random parts of a change fall by 1/2 and fade in wide models"""

    def __post_init__(self) -> None:
        for name in ("steps", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if min(self.lr, self.rise, self.fall) <= 0:
            raise UserError(f"lr={self.lr}, rise={self.rise} and fall={self.fall} must be positive.")
        for size in self.sizes:
            self.family.decoder(size.width, size.depth, 16)

    @property
    def names(self) -> tuple[Name, ...]:
        return compared(self.along, self.parametrizations)

    @property
    def sizes(self) -> list[Size]:
        return varied(self.family, self.along, self.widths, self.depths)


@torch.no_grad()
def activations(model: Transformer, tokens_BT: torch.Tensor, branch_factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Return the QUANTITIES of a forward pass, fp32; those of a branch without the factor that is folded into it."""
    outputs: dict[str, torch.Tensor] = {}
    modules: dict[str, nn.Module] = {"embed": model.embed}
    for i, layer in enumerate(model.layers):
        modules |= {f"{i} attention": layer.get_submodule("attention"), f"{i} feed-forward": layer.get_submodule("mlp")}

    def keep(name: str):
        return lambda module, inputs, output: outputs.update({name: output.float()})

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        logits = model.logits(model(tokens_BT)).float()
    finally:
        for hook in hooks:
            hook.remove()
    assert len(outputs) == len(modules), "the decoder's forward pass no longer calls its modules"
    last = len(model.layers) - 1
    branches = {
        f"{place} {part}": outputs[f"{i} {part}"] / branch_factor
        for place, i in (("first", 0), ("last", last))
        for part in ("attention", "feed-forward")
    }
    return {"embedding": outputs["embed"], **branches, "stream": torch.stack(list(outputs.values())).sum(0), "logits": logits}


def coordinate_check(
    shards: Path | None, out: Path, config: CoordinateConfig, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Check on a text, draw into the folder `out`, and return the lines and verdicts; says beforehand how long it takes."""
    text = open_text(shards, out, config.family, say)
    batch = text.train.batch(0)
    models = len(config.names) * config.seeds
    with (
        open_workers(threads(config.family)) as workers,
        Progress(models * len(config.sizes), "coordinate check", unit="model") as progress,
    ):
        seconds = seconds_a_step(config.family, config.sizes, text.vocab_size, batch, workers)
        expected = sum(seconds.values()) * models * (config.steps + MEASURE_STEPS)
        say(f"{models * len(config.sizes)} models, {config.steps} updates each: about {say_time(expected)}")
        result = check(config, batch, text.vocab_size, workers, progress.update)
    result |= {"picture": str(out / "coordinates.svg"), "data": str(out / "coordinates.json")}
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "coordinates.svg", picture(result))
    save_json(out / "coordinates.json", result)
    return result


def check(
    config: CoordinateConfig, batch: Batch, vocab_size: int, workers: Workers, progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train every size under every parametrisation on one batch, on which it is measured too; return the lines and verdicts.

    One small batch again and again: updates then agree with the activations as far as they can, and the part of a change that
    comes from chance, which falls with the width in any parametrisation, stays small. `activations` and `changes` are mean
    absolute values, indexed [parametrisation][quantity][step][size], averaged over the seeds in logarithms.
    """
    results = {}
    for name in config.names:
        grids = np.stack([_record(config, name, size, batch, vocab_size, workers, progress) for size in config.sizes], -1)
        results[name] = _summary(config, grids)
    return {
        "along": config.along,
        "sizes": [size.width if config.along == "width" else size.depth for size in config.sizes],
        "steps": config.steps,
        "lr": config.lr,
        "optimizer": config.family.optimizer,
        "rise": config.rise,
        "fall": config.fall,
        "parametrizations": results,
    }


def _record(config: CoordinateConfig, name: Name, size: Size, batch, vocab_size: int, workers: Workers, progress) -> np.ndarray:
    """Return mean |activation| and mean |change|, shape (2, quantities, steps + 1), their logarithms averaged over seeds."""
    rates = OptimizerConfig(name=config.family.optimizer, lr=config.lr, muon_lr=MUON_FACTOR * config.lr, weight_decay=0.0)
    grids = []
    for seed in range(config.family.seed, config.family.seed + config.seeds):
        learner = Learner(config.family, size, vocab_size, name, rates, seed, workers)
        start = activations(learner.masters.model, batch[0], learner.branch_factor)
        rows = []
        for step in range(config.steps + 1):
            now = activations(learner.masters.model, batch[0], learner.branch_factor)
            rows.append([[now[q].abs().mean().item() for q in QUANTITIES], [(now[q] - start[q]).abs().mean().item() for q in QUANTITIES]])
            if step < config.steps:
                learner.step(batch)
        grids.append(np.moveaxis(np.array(rows), 0, -1))
        progress()
    with np.errstate(divide="ignore"):
        return np.exp(np.mean(np.log(np.stack(grids)), 0))


def _summary(config: CoordinateConfig, grids: np.ndarray) -> dict[str, Any]:
    """Return the tables and the verdict of one parametrisation; `grids` has shape (2, quantities, steps + 1, sizes)."""
    sizes = np.array([size.width if config.along == "width" else size.depth for size in config.sizes], dtype=float)
    slopes = {q: slope(sizes, grids[1, i, -1]) for i, q in enumerate(QUANTITIES)}
    worst = max(slopes, key=lambda q: _steepness(config, slopes[q]))
    return {
        "activations": {q: grids[0, i].tolist() for i, q in enumerate(QUANTITIES)},
        "changes": {q: grids[1, i].tolist() for i, q in enumerate(QUANTITIES)},
        "slopes": slopes,
        "flat": {q: _steepness(config, slopes[q]) <= 1 for q in QUANTITIES},
        "worst": worst,
        "passes": _steepness(config, slopes[worst]) <= 1,
    }


def _steepness(config: CoordinateConfig, slope: float) -> float:
    """Return a slope in parts of what still counts as flat."""
    return math.inf if math.isnan(slope) else max(slope / config.rise, -slope / config.fall)


def slope(sizes: np.ndarray, values: np.ndarray) -> float:
    """Return the least-squares slope of log(values) over log(sizes); NaN when a value is not positive and finite."""
    if not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def picture(result: dict[str, Any]) -> str:
    """Draw the changes of the last step over the sizes, a panel a parametrisation; returns an SVG file."""
    looks = {"embedding": (0, False), "stream": (5, False), "logits": (6, False)}
    for part, colour in (("attention", 4), ("feed-forward", 1)):
        looks |= {f"first {part}": (colour, False), f"last {part}": (colour, True)}
    panels = []
    for name, found in result["parametrizations"].items():
        worst = f"steepest: {found['worst']}, slope {found['slopes'][found['worst']]:+.2f}"
        lines = [Line(q, result["sizes"], found["changes"][q][-1], *looks[q]) for q in QUANTITIES]
        panels.append(Panel(name, ("flat; " if found["passes"] else "not flat; ") + worst, lines, found["passes"]))
    title = f"Coordinate check along {result['along']}, {result['optimizer']}, after {result['steps']} updates"
    ticks = [(size, str(size)) for size in result["sizes"]]
    return panels_svg(panels, title=title, x_label=result["along"], y_label="mean |change| since the start", x_ticks=ticks, log_y=True)
