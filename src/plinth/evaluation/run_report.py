"""The report of one run of any stage: what it was made from, what it was told, what it logged, drawn over its steps."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from plinth.config import UserError, read_json, write_atomic
from plinth.evaluation import formats
from plinth.evaluation.build_files import BuildFiles, number, run_state
from plinth.evaluation.charts import Series, line_chart, smooth, thin
from plinth.evaluation.metric_words import GROUPS, words_of
from plinth.evaluation.page import render_page
from plinth.run import Run

VERBS = {"dpo": "prefer", "finetune-lm": "transfer finetune-lm", "classify": "transfer classify"}  # of stages named otherwise
JOULES_PER_KWH = 3.6e6
SMOOTHED_FROM = 40  # points; fewer are drawn as they are
TOTALS = ("step", "time_s", "tokens", "energy_kwh", "cost", "co2_g")  # sums that only grow: said in numbers, not drawn


def is_single_run(path: Path) -> bool:
    """Return whether a folder is one stage's run, not a build."""
    try:
        return read_json(Path(path) / "provenance.json").get("stage") not in (None, "build")
    except (UserError, OSError, AttributeError):
        return False


def run_report_data(path: Path) -> dict[str, Any]:
    """Gather what the files of a run say, without writing anything: what `plinth report RUN --json` prints.

    `curves` holds {name: {x, y}} of every number that was logged with a step and changed, `constants` the value of those that never did.
    Whatever is missing or damaged is listed under 'missing' as {what, why}.
    """
    files = BuildFiles(Path(path))
    run = Run(files.path)
    provenance = files.json("provenance.json", "provenance")
    curves = curves_of(files.json_lines("metrics.jsonl"))
    moving = {name: points for name, points in curves.items() if len(set(points["y"])) > 1}
    return {
        "name": files.path.resolve().name,
        "path": str(path),
        "stage": provenance.get("stage"),
        "created": provenance.get("created"),
        "state": run_state(run),
        "summary": files.json("DONE", "summary", quiet=True),
        "curves": {name: points for name, points in moving.items() if name not in TOTALS},
        "constants": {name: points["y"][-1] for name, points in curves.items() if name not in moving and name not in TOTALS},
        "incidents": [record for record in files.json_lines("metrics.jsonl") if record.get("event")],
        "parents": provenance.get("parents") or [],
        "config": files.json("config.json", "configuration"),
        "provenance": provenance,
        "missing": files.gaps,
    }


def curves_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return every number that was logged with a step, {name: {x, y}}, in the order in which they first appear."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in metrics:
        step = number(record.get("step"))
        for name, value in record.items():
            if step is not None and name != "step" and (y := number(value)) is not None:
                points = found.setdefault(name, {"x": [], "y": []})
                points["x"].append(step)
                points["y"].append(y)
    return found


def write_run_report(path: Path, data: Mapping[str, Any] | None = None) -> Path:
    """Write report.html into the run's folder, by rename, and return its path. Nothing else there is touched."""
    data = data or run_report_data(path)
    page = Path(path) / "report.html"
    groups = [(heading, charts) for heading, names in grouped(data["curves"]) if (charts := [_chart(data, name) for name in names])]
    if bins := _calibration_bins(data["summary"]):
        groups.append(("How far its probabilities can be believed", [_reliability_chart(bins)]))
    values = {"facts": facts_of(data["summary"]), "command": command_of(data), "words_of": words_of, "columns_of": columns_of}
    write_atomic(page, render_page("run_report.html.j2", data=data, groups=groups, **values))
    return page


def facts_of(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value with its unit) of each single number of a summary."""
    numbers = [(name, value) for name, value in summary.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return [_fact(name, value) for name, value in numbers]


def _fact(name: str, value: float) -> tuple[str, str]:
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes").replace("_", " "), formats.size(value)
    if name.endswith("_s") and not name.endswith("_per_s"):
        return name.removesuffix("_s").replace("_", " "), formats.duration(value)
    if name == "energy_kwh":
        return "energy", formats.joules(value * JOULES_PER_KWH)
    words = words_of(name)
    return words.label, formats.share(value) if words.unit == "share" and 0 <= value <= 1 else formats.quantity(value, words.unit)


def columns_of(value: Any) -> list[str]:
    """Return the columns of what is a table, a mapping of mappings with the same names; none for anything else."""
    rows = list(value.values()) if isinstance(value, Mapping) else []
    same = len(rows) > 1 and all(isinstance(row, Mapping) and row and list(row) == list(rows[0]) for row in rows)
    return list(rows[0]) if same and "ci95" not in rows[0] else []


def command_of(data: Mapping[str, Any]) -> str:
    """Return the command that made a run, as it is typed."""
    argv = [str(each) for each in data["provenance"].get("argv") or []]
    if argv[:1] == ["plinth"]:  # a stage of another verb
        return shlex.join(argv)
    return f"plinth {VERBS.get(data['stage'], data['stage'])} {shlex.join(argv)}".strip()


def _calibration_bins(summary: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the reliability bins of a reward model's report, or none."""
    held_out = summary.get("held_out")
    calibration = held_out.get("calibration") if isinstance(held_out, dict) else None
    return calibration.get("bins", []) if isinstance(calibration, dict) else []


def _reliability_chart(bins: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the chart of shares that came true over the confidence; what stands on the diagonal can be believed."""
    x = [each["confidence"] for each in bins]
    series = [Series("came true", x, [each["share"] for each in bins], slot=1), Series("to be believed", x, x, slot=2)]
    title = f"Share right over confidence, {len(bins)} bins"
    svg = line_chart(series, title=title, x_label="confidence", y_label="share right")
    about = "Held-out comparisons by how sure the model is of them; below the second line it is too sure."
    return {"name": "reliability", "about": about, "svg": Markup(svg)}


def grouped(curves: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (heading, names) for what was logged, known names in their group's order, unknown ones last."""
    known = {name for _, names in GROUPS for name in names}
    rest = [name for name in curves if name not in known]
    return [(heading, [name for name in names if name in curves]) for heading, names in GROUPS] + [("Also logged", rest)]


def _chart(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    words, points = words_of(name), data["curves"][name]
    x, y = points["x"], points["y"]
    series = [Series(words.label, x, y, slot=1)]
    if len(y) > SMOOTHED_FROM and name != "lr":
        series = [Series(words.label, x, y, slot=1, faint=True), Series("smoothed", x, smooth(y, len(y) // 25), slot=1)]
    title = f"{words.label} over steps, from {y[0]:.4g} to {y[-1]:.4g}"
    svg = line_chart(series, title=title, x_label="step", y_label=words.unit or words.label, y_from_zero=words.unit == "share")
    return {"name": words.label, "about": words.about, "svg": Markup(svg)}


def run_card(data: Mapping[str, Any]) -> Group:
    """Return a run's report for a terminal: its state, and of each curve the first, the last and the extreme values."""
    time_s = number(data["summary"].get("time_s"))
    head = Text(f"{data['name']}: {data['stage']}, {data['state']}", style="bold")
    head.append(f"  {formats.duration(time_s)}" if time_s else "", style="dim")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "first", "last", "lowest", "highest"):
        table.add_column(name, justify="right" if name else "left")
    for _, names in grouped(data["curves"]):
        for name in names:
            y = data["curves"][name]["y"]
            table.add_row(words_of(name).label, *(f"{value:.4g}" for value in (y[0], y[-1], min(y), max(y))))
        table.add_section()
    gaps = [Text(f"missing: {gap['what']}: {gap['why']}", style="yellow") for gap in data["missing"]]
    return Group(head, table, *gaps)


def thinned(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with curves of as many points as a chart draws, for printing."""
    curves = {name: dict(zip("xy", thin(points["x"], points["y"]))) for name, points in data["curves"].items()}
    return {**data, "curves": curves}
