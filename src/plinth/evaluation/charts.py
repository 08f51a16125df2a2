"""Charts as inline SVG: lines over steps, and intervals against a goal.

Every function returns the text of one `<svg>` element without scripts or external references. Colours come from the CSS
variables of the page (`--ink --muted --grid --good --bad --series-1 ...`), so that a chart follows dark mode and print. The view
box is narrow on purpose: at 320 px of screen its labels are still some 10 px high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH = 340
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 12, 36
MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y), its name for the legend, and how it is drawn."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    slot: int = 1
    """Which of the page's series colours, 1 to 4."""
    faint: bool = False
    """Drawn thin and pale: raw values behind a smoothed line."""


@dataclass(frozen=True)
class Interval:
    """One value with its 95 % interval, drawn as a dot on a line."""

    label: str
    value: float
    low: float
    high: float
    slot: int = 1


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that lie within [low, high].

    Raises ValueError when a bound is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"cannot place ticks between {low} and {high}: both ends must be finite.")
    if high <= low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over `window` points, shortened at both ends so that it adds no lag."""
    half = max(window // 2, 0)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    n = len(values)
    return [(sums[min(i + half + 1, n)] - sums[max(i - half, 0)]) / (min(i + half + 1, n) - max(i - half, 0)) for i in range(n)]


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most about `limit` points of a line: of each bucket the lowest and the highest, so that no spike is lost."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) > limit:
        size = math.ceil(len(pairs) / (limit / 2))
        kept = []
        for start in range(0, len(pairs), size):
            bucket = pairs[start : start + size]
            kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
        pairs = kept if kept[-1] == pairs[-1] else [*kept, pairs[-1]]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def short_number(value: float) -> str:
    """A tick label of few characters: 0, 0.5, 12, 3.4k, 5M, 2e-05."""
    size = abs(value)
    if size == 0:
        return "0"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if suffix != 'k' else 1e3):.4g}{suffix}"
    if size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[str, float]] = (),
    height: int = 200,
    y_from_zero: bool = False,
) -> str:
    """Lines with axes, ticks, units and, where there is more than one, a legend above.

    `marks` are (label, y) drawn as dashed horizontal lines, for instance a predicted loss. Points that are not finite are left
    out. Returns '' when no finite point is there to draw.
    """
    drawn = []
    for one in series:
        x, y = thin(one.x, one.y)
        if x:
            drawn.append((one, x, y))
    if not drawn:
        return ""
    marks = [(label, y) for label, y in marks if math.isfinite(y)]
    named = [one for one, _, _ in drawn if not one.faint]
    top = TOP + (16 if len(named) + len(marks) > 1 else 0)
    x_range = _range([0.0, *(v for _, x, _ in drawn for v in x)])
    y_range = _round_out(_range([*(v for _, _, y in drawn for v in y), *(y for _, y in marks), *([0.0] if y_from_zero else [])]))
    to_x = _scale(x_range, LEFT, WIDTH - RIGHT)
    to_y = _scale(y_range, height - BOTTOM, top)
    parts = _axes(x_range, y_range, to_x, to_y, height, x_label, y_label)
    for one, x, y in drawn:
        points = " ".join(f"{to_x(a):.1f},{to_y(b):.1f}" for a, b in zip(x, y, strict=True))
        css = f"line s{one.slot}" + (" faint" if one.faint else "")
        shape = f'<polyline class="{css}" points="{points}"/>'
        if len(x) == 1:
            shape = f'<circle class="dot s{one.slot}" cx="{to_x(x[0]):.1f}" cy="{to_y(y[0]):.1f}" r="2.5"/>'
        parts.append(shape)
    for _, y in marks:
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{to_y(y):.1f}" y2="{to_y(y):.1f}"/>')
    if top > TOP:
        parts.append(_legend([(one.name, f"s{one.slot}") for one in named] + [(label, "mark") for label, _ in marks]))
    return _svg(parts, height, title)


def interval_chart(rows: Sequence[tuple[str, Sequence[Interval], float | None, str]], *, title: str, x_label: str) -> str:
    """Values from 0 to 1 with their intervals, grouped, each group against its goal.

    Each row is (heading, intervals, goal or None, 'at least' | 'at most'); the side of the goal that meets it is shaded.
    Returns '' when there is no interval.
    """
    if not any(intervals for _, intervals, _, _ in rows):
        return ""
    parts, y, left, right = [], 8.0, 44.0, WIDTH - 12.0
    to_x = _scale((0.0, 1.0), left, right)
    for heading, intervals, goal, side in rows:
        parts.append(f'<text class="label strong" x="0" y="{y + 8:.1f}">{escape(heading)}</text>')
        y += 16
        bottom = y + 15 * len(intervals)
        if goal is not None:
            a, b = (to_x(goal), right) if side == "at least" else (left, to_x(goal))
            parts.append(f'<rect class="goal" x="{a:.1f}" y="{y:.1f}" width="{b - a:.1f}" height="{bottom - y:.1f}"/>')
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            parts.append(f'<line class="grid" x1="{to_x(tick):.1f}" x2="{to_x(tick):.1f}" y1="{y:.1f}" y2="{bottom:.1f}"/>')
        for one in intervals:
            parts += _interval(one, y + 7.5, to_x)
            y += 15
        y += 10
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, anchor = (to_x(tick) + 10, "end") if tick == 1 else (to_x(tick), "middle")  # the last one must not run out of the box
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" y="{y + 4:.1f}">{tick:.0%}</text>')
    parts.append(f'<text class="tick" text-anchor="middle" x="{(left + right) / 2:.1f}" y="{y + 18:.1f}">{escape(x_label)}</text>')
    return _svg(parts, int(y + 24), title)


def _interval(one: Interval, y: float, to_x) -> list[str]:
    low, high = max(0.0, one.low), min(1.0, one.high)
    return [
        f'<text class="tick" x="0" y="{y + 3.5:.1f}">{escape(one.label)}</text>',
        f'<line class="whisker s{one.slot}" x1="{to_x(low):.1f}" x2="{to_x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<circle class="dot s{one.slot}" cx="{to_x(one.value):.1f}" cy="{y:.1f}" r="3.5"/>',
    ]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    return low, high


def _round_out(limits: tuple[float, float]) -> tuple[float, float]:
    """Widen an axis to the next ticks, so that both of its ends are labelled."""
    ticks = nice_ticks(*limits, count=4)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else limits[1] - limits[0]
    low, high = math.floor(limits[0] / step + 1e-9) * step, math.ceil(limits[1] / step - 1e-9) * step
    return low, high


def _scale(domain: tuple[float, float], start: float, end: float):
    low, high = domain
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(x_range, y_range, to_x, to_y, height: int, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in nice_ticks(*y_range, count=4):
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 5}" y="{y + 3.5:.1f}">{short_number(tick)}</text>')
    base = height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in nice_ticks(*x_range, count=4):
        x = to_x(tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" y="{base + 15}">{short_number(tick)}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + base) / 2
    parts.append(f'<text class="tick" text-anchor="middle" x="{middle_x:.0f}" y="{height - 4}">{escape(x_label)}</text>')
    parts.append(f'<text class="tick" text-anchor="middle" transform="translate(10 {middle_y:.0f}) rotate(-90)">{escape(y_label)}</text>')
    return parts


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    parts, x = [], float(LEFT)
    for name, css in entries:
        css = css if css == "mark" else f"line {css}"
        parts.append(f'<line class="{css}" x1="{x:.0f}" x2="{x + 14:.0f}" y1="9" y2="9"/>')
        parts.append(f'<text class="tick" x="{x + 18:.0f}" y="12.5">{escape(name)}</text>')
        x += 32 + 6.2 * len(name)
    return "".join(parts)


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label={quoteattr(title)}><title>{escape(title)}</title>{body}</svg>'
