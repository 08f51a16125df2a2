"""A run in the terminal: its numbers, the loss as a plot of braille dots with the predicted curve, and small lines for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column within a cell of the braille block
STYLES = {"running": "green", "done": "green", "waiting": "yellow", "quiet": "yellow", "stopped": "red", "failed": "red"}
NAMES = {"tokens_per_s": "tokens/s", "grad_norm": "gradient norm", "lr": "learning rate"}
SHOWN_INCIDENTS = 4


def frame(state: dict[str, Any], curves: dict[str, Any], width: int = 80) -> RenderableType:
    """Return one picture of a run from `Watcher.state` and `Watcher.curves`, `width` cells wide."""
    parts: list[RenderableType] = [_head(state)]
    if state["stages"]:
        parts.append(Text(" → ".join(_stage_words(stage) for stage in state["stages"]), style="dim"))
    if state["steps"]:
        left = f", {duration(state['eta_s'])} left" if state["eta_s"] is not None else ""
        bar = Table.grid(padding=(0, 1))
        done = f"step {state['step']:,} of {state['steps']:,}{left}"
        bar.add_row(ProgressBar(total=state["steps"], completed=state["step"], width=max(10, width - len(done) - 2)), done)
        parts.append(bar)
    parts.append(_numbers(state))
    parts += _loss_plot(state, curves.get("loss_nats", {}), width)
    for name, label in NAMES.items():
        y = curves.get(name, {}).get("raw", [[], []])[1]
        if y:
            parts.append(
                Text(f"{label:>14} ", style="dim").append(sparkline(y, max(10, width - 34)), style="cyan").append(f" {short(y[-1])}")
            )
    for incident in state["incidents"][-SHOWN_INCIDENTS:]:
        parts.append(
            Text(
                f"step {incident['step']} {incident['event']} ({incident['action']}): {incident['reason']} {incident['documents']}",
                style="red",
            )
        )
    return Group(*parts)


def _head(state: dict[str, Any]) -> Text:
    text = Text(state["name"], style="bold").append(f"  {state['stage'] or ''}  ", style="dim")
    text.append(state["status"], style=STYLES[state["status"]])
    return text.append(f"  {state['message']}" if state["message"] else "", style="dim")


def _stage_words(stage: dict[str, Any]) -> str:
    return f"{stage['name']} {duration(stage['time_s'])}" if stage["time_s"] is not None else f"{stage['name']} …"


def _numbers(state: dict[str, Any]) -> Table:
    """Return the numbers of now, in pairs of name and value."""
    predicted = state["predicted"] or {}
    entries = [
        ("loss", short(state["loss_nats"])),
        ("predicted at the end", short(predicted.get("loss_nats"))),
        ("tokens/s", short(state["tokens_per_s"])),
        ("MFU", "–" if state["mfu"] is None else f"{state['mfu']:.1%}"),
        ("gradient norm", short(state["grad_norm"])),
        ("learning rate", short(state["lr"])),
        ("tokens", short(state["tokens"])),
        ("time", duration(state["time_s"])),
        ("energy", "–" if state["energy_kwh"] is None else f"{1000 * state['energy_kwh']:.3g} Wh ({energy_word(state)})"),
    ]
    entries += [("cost", short(state["cost"]))] if state["cost"] is not None else []
    entries += [("CO2e", f"{state['co2_g']:.3g} g")] if state["co2_g"] is not None else []
    entries += [("incidents", f"{state['num_incidents']}, {state['num_skipped']} left out")] if state["num_incidents"] else []
    table = Table.grid(padding=(0, 2))
    for i in range(0, len(entries), 2):
        cells = []
        for name, value in entries[i : i + 2]:
            cells += [Text(name, style="dim"), Text(value)]
        table.add_row(*cells)
    return table


def energy_word(state: dict[str, Any]) -> str:
    """Return how the energy is known, in one word or two."""
    source = state["energy_source"] or ""
    return "estimate" if source.startswith("estimate") else "measured" if source.startswith("measured") else "source not recorded"


def _loss_plot(state: dict[str, Any], curve: dict[str, Any], width: int) -> list[RenderableType]:
    x, y = curve.get("smooth") or curve.get("raw") or [[], []]
    if len(x) < 2:
        return []
    predicted = state["predicted"] or {"x": [], "y": []}
    end = max(state["steps"] or 0, x[-1])
    low, high = min(y), max(y)
    shown = [(a, b) for a, b in zip(predicted["x"], predicted["y"]) if a >= x[0] and b <= high]
    low = min([low, *(b for _, b in shown)])
    area = (0.0, end, low, high)
    columns, rows = max(20, width - 12), 10
    actual = braille(list(zip(x, y)), area, columns, rows)
    expected = braille(shown, area, columns, rows)
    lines: list[RenderableType] = []
    for number, (mine, other) in enumerate(zip(actual, expected)):
        label = short(high) if number == 0 else short(low) if number == rows - 1 else ""
        text = Text(f"{label:>8} ", style="dim")
        for a, b in zip(mine, other):
            text.append(*((a, "cyan") if a != " " else (b, "yellow")))
        lines.append(text)
    legend = Text(f"{'0':>9}{'step ' + short(end):>{columns}}\n", style="dim").append("         loss, nats a token", style="cyan")
    if shown:
        legend.append("   predicted for a run that ends there", style="yellow")
    return [*lines, legend]


def braille(points: Sequence[tuple[float, float]], area: tuple[float, float, float, float], columns: int, rows: int) -> list[str]:
    """Return `rows` lines of `columns` cells with a dot, 2 x 4 a cell, wherever the line through `points` passes.

    `area` is (left, right, bottom, top) in the points' units; empty cells are spaces.
    """
    left, right, bottom, top = area
    cells = [[0] * columns for _ in range(rows)]
    wide, tall = 2 * columns - 1, 4 * rows - 1
    places = [(round((x - left) / ((right - left) or 1.0) * wide), round((top - y) / ((top - bottom) or 1.0) * tall)) for x, y in points]
    for (x0, y0), (x1, y1) in zip(places, places[1:] or places):
        for i in range((steps := max(abs(x1 - x0), abs(y1 - y0), 1)) + 1):
            x, y = round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
            if 0 <= x <= wide and 0 <= y <= tall:
                cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def sparkline(values: Sequence[float], width: int) -> str:
    """Return `width` bars at most: the mean of each stretch, from the lowest to the highest."""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[len(values) * i // count : len(values) * (i + 1) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    return "".join(BARS[round((value - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for value in means)


def short(value: float | None) -> str:
    """Return a number in few characters: 1.234, 12.3k, 4.5M; – for None."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if suffix != 'k' else 1e3):.3g}{suffix}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Return seconds as 8.2 s, 3 min 5 s or 2 h 4 min; – for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
