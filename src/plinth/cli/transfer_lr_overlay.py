"""`plinth transfer lr-overlay`: loss against learning rate for several widths or depths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.recipes.learning_rate_overlay import OverlayConfig, overlay


@dataclass(frozen=True)
class Options:
    """Train models of several sizes at several learning rates; where rates transfer, the curves have their lowest points above each other.

    Every finished run is kept under --out: the command goes on where it was stopped, may be called with more sizes or rates, and
    several processes may share the folder.
    """

    shards: Annotated[Path | None, tyro.conf.Positional] = None
    """shards folder (default: made from the embedded text, under --out)"""
    out: Path = Path("runs/lr-overlay")
    """folder for overlay.svg, overlay.json, the points and the embedded text"""
    config: Annotated[OverlayConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=OverlayConfig)
    """models, rates and steps"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth transfer lr-overlay", args=argv)
    result = overlay(options.shards, options.out, options.config, say)
    emit(result, options.json, lambda console: show(console, result))
    return 0


def show(console: Console, result: dict[str, Any]) -> None:
    """Draw the losses, a table a parametrisation."""
    for name, found in result["parametrizations"].items():
        table = Table("lr", *(f"{result['along']} {size}" for size in result["sizes"]), title=name)
        for i, lr in enumerate(result["log2_lrs"]):
            table.add_row(f"2^{lr}", *("diverged" if row[i] is None else f"{row[i]:.3f}" for row in found["loss_nats"]))
        table.add_section()
        table.add_row("best lr", *("-" if x is None else f"2^{x:.2f}" for x in found["optimum_log2_lr"]))
        table.add_row("shift, octaves", *("-" if x is None else f"{x:+.2f}" for x in found["shift_octaves"]))
        table.add_row("cost of the base's rate", *("diverged" if x is None else f"{x:.3f}" for x in found["transfer_cost_nats"]))
        console.print(table)
        if any(found["optimum_at_edge"]):
            console.print("An optimum lies at the edge of the rates tried; add rates with --log2-lrs.", markup=False)
    console.print(f"drawn in {result['picture']}", markup=False)
