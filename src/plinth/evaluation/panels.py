"""Pictures of experiments over sizes: panels side by side on shared axes, one SVG file that needs nothing else.

The file carries its own style for light and dark screens. Axes are logarithmic where asked; values above the top of an axis are
drawn at its edge, so that a diverged run does not flatten the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from plinth.evaluation.charts import nice_ticks, short_number

PANEL_WIDTH, PANEL_HEIGHT = 300, 220
LEFT, TOP, GAP, BOTTOM, LEGEND_LINE = 58, 64, 22, 44, 18
NUM_COLOURS = 6
STYLE = """
.panels { --paper: #ffffff; --ink: #1a1d21; --muted: #5b636e; --grid: #e6e9ee; --good: #12743b; --bad: #b3261e;
  --c0: #5b636e; --c1: #b85c00; --c2: #b3305f; --c3: #7440b8; --c4: #1f5fd0; --c5: #0f7f78; --c6: #1a1d21;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 11px; }
@media (prefers-color-scheme: dark) { .panels { --paper: #14171b; --ink: #e7eaee; --muted: #9fa8b4; --grid: #2a3038;
  --good: #6fd096; --bad: #ff9c92;
  --c0: #9fa8b4; --c1: #f2a35a; --c2: #f58fb0; --c3: #bb9bf2; --c4: #7aaeff; --c5: #5ecfc4; --c6: #e7eaee; } }
.panels .paper { fill: var(--paper); } .panels text { fill: var(--muted); }
.panels .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
.panels .head { fill: var(--ink); font-size: 12px; font-weight: 600; }
.panels .good { fill: var(--good); } .panels .bad { fill: var(--bad); }
.panels .grid { stroke: var(--grid); } .panels .axis { stroke: var(--muted); } .panels .best { stroke: var(--paper); stroke-width: 1.5; }
.panels .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .panels .dashed { stroke-dasharray: 5 3; }
"""


@dataclass(frozen=True)
class Line:
    """Points of one curve, in rising order of x; the one at `best` is drawn large."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    """0 (grey) to 6 (ink); 1 to 5 are hues in the order of a rainbow, for ordered things"""
    dashed: bool = False
    best: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes: its heading, a line below it, and whether that is good news."""

    heading: str
    note: str
    lines: Sequence[Line]
    good: bool | None = None


def panels_svg(
    panels: Sequence[Panel], *, title: str, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]],
    log_y: bool = False, y_top: float | None = None, log_x: bool = True,
) -> str:  # fmt: skip
    """Draw the panels and return the text of an SVG file; x is logarithmic unless `log_x` is false, y where `log_y` says so.

    `x_ticks` are (value, label). Values above `y_top` are drawn at the edge; those that are not finite likewise; with `log_y`
    those not above 0 are left out. Raises ValueError when no finite value is there to draw.
    """
    low, high = _y_range(panels, log_y, y_top)
    scale = math.log10 if log_y else float
    base, edge = TOP + PANEL_HEIGHT, TOP
    a, b = scale(low), scale(high)

    def to_y(value: float) -> float:
        clipped = min(value, high) if math.isfinite(value) else high
        return base - (scale(clipped) - a) / (b - a) * (base - edge)

    along = math.log2 if log_x else float
    x_low, x_high = along(x_ticks[0][0]), along(x_ticks[-1][0])
    width = LEFT + len(panels) * (PANEL_WIDTH + GAP)
    legend, legend_height = _legend(panels[0].lines, width)
    height = base + BOTTOM + legend_height
    parts = [f'<rect class="paper" width="{width}" height="{height}"/>', f'<text class="title" x="12" y="22">{escape(title)}</text>']
    for i, panel in enumerate(panels):
        left = LEFT + i * (PANEL_WIDTH + GAP)

        def to_x(value: float, left: float = left) -> float:
            return left + 8 + (along(value) - x_low) / ((x_high - x_low) or 1.0) * (PANEL_WIDTH - 16)

        parts += _axes(panel, left, to_x, to_y, x_ticks, _y_ticks(low, high, log_y), labelled=i == 0)
        parts += [_curve(line, to_x, to_y, log_y) for line in panel.lines]
    middle = (LEFT + width - GAP) / 2
    parts.append(f'<text text-anchor="middle" x="{middle:.0f}" y="{base + 32}">{escape(x_label)}</text>')
    parts.append(f'<text text-anchor="middle" transform="translate(14 {(base + edge) / 2:.0f}) rotate(-90)">{escape(y_label)}</text>')
    parts.append(f'<g transform="translate(0 {base + BOTTOM})">{legend}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="panels" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label={quoteattr(title)}><style>{STYLE}</style><title>{escape(title)}</title>{"".join(parts)}</svg>\n'
    )


def _y_range(panels: Sequence[Panel], log_y: bool, y_top: float | None) -> tuple[float, float]:
    values = [y for panel in panels for line in panel.lines for y in line.y if math.isfinite(y) and (y > 0 or not log_y)]
    if not values:
        raise ValueError("no finite value to draw.")
    low, high = min(values), max(values) if y_top is None else min(max(values), y_top)
    if log_y:
        return low / 1.3, max(high, low * 2) * 1.3
    margin = max(high - low, 1e-6) * 0.06
    return low - margin, high + margin


def _y_ticks(low: float, high: float, log_y: bool) -> list[float]:
    if not log_y:
        return nice_ticks(low, high, count=5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    return [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]


def _axes(panel: Panel, left: float, to_x, to_y, x_ticks, y_ticks, *, labelled: bool) -> list[str]:
    right, base = left + PANEL_WIDTH, TOP + PANEL_HEIGHT
    mood = {None: "", True: " good", False: " bad"}[panel.good]
    parts = [
        f'<text class="head" x="{left}" y="{TOP - 22}">{escape(panel.heading)}</text>',
        f'<text class="note{mood}" x="{left}" y="{TOP - 8}">{escape(panel.note)}</text>',
    ]
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{to_y(tick):.1f}" y2="{to_y(tick):.1f}"/>')
        if labelled:
            parts.append(f'<text text-anchor="end" x="{left - 6}" y="{to_y(tick) + 3.5:.1f}">{short_number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>')
    for value, label in x_ticks:
        parts.append(f'<line class="axis" x1="{to_x(value):.1f}" x2="{to_x(value):.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text text-anchor="middle" x="{to_x(value):.1f}" y="{base + 16}">{escape(label)}</text>')
    return parts


def _curve(line: Line, to_x, to_y, log_y: bool) -> str:
    points = [(to_x(x), to_y(y)) for x, y in zip(line.x, line.y, strict=True) if not (log_y and y <= 0)]
    css = "line dashed" if line.dashed else "line"
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline class="{css}" style="stroke: var(--c{line.colour})" points="{text}"/>']
    parts += [f'<circle style="fill: var(--c{line.colour})" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points]
    if line.best is not None:
        x, y = to_x(line.best[0]), to_y(line.best[1])
        parts.append(f'<circle class="best" style="fill: var(--c{line.colour})" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>')
    return "".join(parts)


def _legend(lines: Sequence[Line], width: float) -> tuple[str, int]:
    """Return the legend, wrapped to the width, and its height."""
    parts, x, y = [], float(LEFT), 8.0
    for line in lines:
        needed = 36 + 6.3 * len(line.name)
        if x > LEFT and x + needed > width - 10:
            x, y = float(LEFT), y + LEGEND_LINE
        css = "line dashed" if line.dashed else "line"
        parts.append(
            f'<line class="{css}" style="stroke: var(--c{line.colour})" x1="{x:.0f}" x2="{x + 18:.0f}" y1="{y:.0f}" y2="{y:.0f}"/>'
        )
        parts.append(f'<text x="{x + 23:.0f}" y="{y + 3.5:.1f}">{escape(line.name)}</text>')
        x += needed
    return "".join(parts), int(y + LEGEND_LINE)
