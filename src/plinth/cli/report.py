"""`plinth report`: write the report of a build, or of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.evaluation.report import report_card, report_data, write_report
from plinth.evaluation.run_report import is_single_run, run_card, run_report_data, thinned, write_run_report


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html into the directory of a build or of one run, from the files that lie there, and print a short form of it."""

    run: Annotated[Path, tyro.conf.Positional]
    """build or run directory: what a plinth verb wrote with --out; only report.html in it is written"""
    json: bool = False
    """print everything that the report holds as one JSON object"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when the directory holds neither a build nor a run."""
    options = read_options(ReportOptions, args=argv, prog="plinth report")
    data: dict[str, Any]
    if is_single_run(options.run):
        data = run_report_data(options.run)
        page, card = write_run_report(options.run, data), run_card(data)
        data = thinned(data)
    else:
        data = report_data(options.run)
        page, card = write_report(options.run, data), report_card(options.run, data)

    def render(console: Console) -> None:
        console.print(card)
        console.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)

    emit({"report": str(page), **data}, options.json, render)
    return 0
