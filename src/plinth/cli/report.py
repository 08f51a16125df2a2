"""`plinth report`: write the report of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from plinth.cli.output import emit
from plinth.evaluation.report import report_card, report_data, write_report


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html into a build directory, from the files that lie there, and print its report card."""

    run: Annotated[Path, tyro.conf.Positional]
    """Build directory: what `plinth build --out` wrote. Only report.html in it is written."""
    json: bool = False
    """Print everything that the report holds as one JSON object."""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when the directory holds no build."""
    options = tyro.cli(ReportOptions, args=argv, prog="plinth report")
    data = report_data(options.run)
    page = write_report(options.run, data)

    def render(console: Console) -> None:
        console.print(report_card(options.run, data))
        console.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)

    emit({"report": str(page), **data}, options.json, render)
    return 0
