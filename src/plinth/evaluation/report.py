"""The report of a build: one self-contained page, and a card for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from plinth.config import write_atomic
from plinth.evaluation import formats, verdict
from plinth.evaluation.build_files import NAMES
from plinth.evaluation.charts import Interval, Series, interval_chart, line_chart, smooth
from plinth.evaluation.page import render_page
from plinth.evaluation.report_data import report_data

__all__ = ["report_card", "report_data", "write_report"]

SLOTS = {"pretrain": 3, "sft": 2, "dpo": 1}
MARKS = {"better": ("▲", "better", "green"), "worse": ("▼", "worse", "red"), "unclear": ("≈", "no clear difference", "dim")}
CURVE_NAMES = {
    "loss_nats": ("training loss", "nats per token"),
    "lr": ("learning rate", "learning rate"),
    "accuracy": ("chosen preferred", "share"),
    "margin": ("reward margin", "nats"),
}


def write_report(build_dir: Path, data: Mapping[str, Any] | None = None) -> Path:
    """Write report.html into the build directory, by rename, and return its path. Nothing else there is touched.

    `data` is what `report_data` returned for it, when it has been gathered already.
    """
    page = Path(build_dir) / "report.html"
    write_atomic(page, render_report(data or report_data(build_dir)))
    return page


def render_report(data: Mapping[str, Any]) -> str:
    """The HTML page of what `report_data` returned. All text from the data is escaped."""
    goal_chart = Markup(_goal_chart(data))
    return render_page("report.html.j2", data=data, goal_chart=goal_chart, curves=_curve_charts(data))


def _goal_chart(data: Mapping[str, Any]) -> str:
    """The goals' shares with intervals, for every stage."""
    found = []
    for goal in data["goals"]:
        intervals = [
            Interval(NAMES[stage], cell["value"], *cell["ci95"], slot=SLOTS[stage])
            for stage, cell in verdict.cells_of(data["evaluation"], goal["key"]).items()
            if cell and cell["ci95"]
        ]
        if intervals:
            heading = f"{verdict.QUESTIONS[goal['key']][0]}, goal {goal['side']} {goal['goal']:.0%}"
            found.append((heading, intervals, goal["goal"], goal["side"]))
    return interval_chart(found, title="Shares with 95 % intervals by stage; the shaded side meets the goal", x_label="share of questions")


def _curve_charts(data: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The charts of each stage, none for a stage that logged nothing."""
    predicted = next((row["predicted"] for row in data["plan"].get("rows", ()) if row["key"] == "loss_nats"), None)
    return {
        stage: [
            {"name": CURVE_NAMES[key][0], "svg": _curve_chart(NAMES[stage], curve, key, predicted if stage == "pretrain" else None)}
            for key in CURVE_NAMES
            if key in curve
        ]
        for stage, curve in data["curves"].items()
    }


def _curve_chart(name: str, curve: Mapping[str, Mapping[str, list[float]]], key: str, predicted: float | None) -> Markup:
    label, unit = CURVE_NAMES[key]
    if key == "loss_nats":
        unit = {"SFT": "nats per answer token", "DPO": "nats per pair"}.get(name, unit)
    x, y = curve[key]["x"], curve[key]["y"]
    series = [Series(label, x, y, slot=1)]
    if key not in ("lr",) and len(y) > 40:
        series = [Series(label, x, y, slot=1, faint=True), Series("smoothed", x, smooth(y, len(y) // 25), slot=1)]
    marks = []
    if key == "loss_nats":
        if "heldout_loss_nats" in curve:
            series.append(Series("held-out", curve["heldout_loss_nats"]["x"], curve["heldout_loss_nats"]["y"], slot=2))
        marks = [("predicted", predicted)] if predicted is not None else []
    title = f"{name}: {label} in {unit} over steps, from {y[0]:.4g} to {y[-1]:.4g}" if unit != label else f"{name}: {label} over steps"
    return Markup(line_chart(series, title=title, x_label="step", y_label=unit, marks=marks, y_from_zero=key in ("lr", "accuracy")))


def report_card(build_dir: Path, data: Mapping[str, Any] | None = None) -> Group:
    """The verdict, the table BASE | SFT | DPO, the goals and what is missing, for a terminal; `data` as in `write_report`."""
    data = data or report_data(build_dir)
    parts: list[Any] = [Text(data["verdict"], style="bold")]
    total = formats.duration(data["total_s"])
    parts.append(Text(f"{data['path']} · {data['created'] or 'date unknown'} · total time {total}", style="dim"))
    if data["evaluation"]["stages"]:
        parts.append(Padding(_card_table(data["evaluation"]), (1, 0)))
    parts += [_goal_line(goal) for goal in data["goals"] if goal["met"] is not None]
    parts += [_improvement_line(entry) for entry in data["improvements"]]
    if data["plan"] and data["plan"]["rows"]:
        parts.append(Padding(_plan_table(data["plan"]["rows"]), (1, 0)))
    parts += [Text(f"missing: {gap['what']}: {gap['why']}", style="yellow") for gap in data["missing"]]
    return Group(*parts)


def _plan_table(rows: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, title="plan against actual", title_justify="left")
    for name in ("", "predicted", "actual", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        values = [formats.quantity(row[key], row["unit"]) if row[key] is not None else "–" for key in ("predicted", "actual")]
        table.add_row(row["label"], *values, f"{row['ratio']:.2f}" if row["ratio"] else "")
    return table


def _card_table(evaluation: Mapping[str, Any]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
        title="with 95 % intervals; ▲ better, ▼ worse than BASE: intervals apart; ≈ they overlap",
        title_justify="left",
    )
    table.add_column("")
    for stage in evaluation["stages"]:
        table.add_column(NAMES[stage], justify="right")
    for group in evaluation["groups"]:
        for i, row in enumerate(group["rows"]):
            last = i == len(group["rows"]) - 1
            cells = [_card_cell(row["cells"].get(stage), row["format"]) for stage in evaluation["stages"]]
            table.add_row(Text(row["label"]), *cells, end_section=last)
    return table


def _card_cell(cell: Mapping[str, Any] | None, style: str) -> Text:
    if not cell:
        return Text("–", style="dim")
    mark, _, colour = MARKS.get(cell["against_base"] or "", ("", "", ""))
    text = Text(f"{mark} {formats.score(cell, style)}".strip(), style=colour)
    return text.append(f" n={formats.count(cell['n'])}\n{formats.interval(cell, style)}", style="dim")


def _goal_line(goal: Mapping[str, Any]) -> Text:
    met = goal["met"]
    text = Text("✓ met    " if met else "✗ missed ", style="green" if met else "red")
    value, around = formats.share(goal["cell"]["value"]), formats.interval(goal["cell"], "share")
    unsure = "" if goal["clear"] else "; the interval reaches across the goal"
    return text.append(f"{goal['label']}: {value} ({around}{unsure}), goal {goal['side']} {goal['goal']:.0%}", style="default")


def _improvement_line(entry: Mapping[str, Any]) -> Text:
    yes = entry["shown"]
    text = Text("✓ yes    " if yes else "✗ no     ", style="green" if yes else "red")
    numbers = f"{formats.share(entry['before'])} → {formats.share(entry['value'])}"
    beyond = {"better": "beyond the intervals", "worse": "worse, beyond the intervals", "unclear": "within the intervals"}[entry["outcome"]]
    return text.append(f"{NAMES[entry['stage']]}: {entry['label']}: {numbers}, {beyond}{_paired_words(entry['paired'])}", style="default")


def _paired_words(paired: Mapping[str, Any] | None) -> str:
    if not paired:
        return ""
    low, high = map(formats.points, paired["ci95"])
    return f"; on the same questions {formats.points(paired['value'])} points ({low} to {high})"
