"""`plinth transfer coord-check`: do activations move alike at every width or depth?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.recipes.coordinate_check import QUANTITIES, CoordinateConfig, coordinate_check


@dataclass(frozen=True)
class Options:
    """Train real models of several sizes for a few steps and see whether their activations move by the same amount.

    The exit code is 0 also when a parametrisation is not flat; --json has the verdicts.
    """

    shards: Annotated[Path | None, tyro.conf.Positional] = None
    """shards folder (default: made from the embedded text, under --out)"""
    out: Path = Path("runs/coord-check")
    """folder for coordinates.svg, coordinates.json and the embedded text"""
    config: Annotated[CoordinateConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=CoordinateConfig)
    """models and steps"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth transfer coord-check", args=argv)
    result = coordinate_check(options.shards, options.out, options.config, say)
    emit(result, options.json, lambda console: show(console, result))
    return 0


def show(console: Console, result: dict[str, Any]) -> None:
    """Draw the changes of the last step, a table a parametrisation."""
    for name, found in result["parametrizations"].items():
        table = Table("mean |change|", *(f"{result['along']} {size}" for size in result["sizes"]), "slope", title=name)
        for quantity in QUANTITIES:
            mark = "" if found["flat"][quantity] else " not flat"
            table.add_row(
                quantity, *(f"{value:.4g}" for value in found["changes"][quantity][-1]), f"{found['slopes'][quantity]:+.2f}{mark}"
            )
        console.print(table)
        verdict = "passes" if found["passes"] else "fails"
        between = f"flat is between -{result['fall']} and +{result['rise']}"
        console.print(f"{name} {verdict}: the steepest is {found['worst']}; {between}", markup=False)
    console.print(f"drawn in {result['picture']}", markup=False)
