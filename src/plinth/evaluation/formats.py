"""Numbers as people read them: shares, times, sizes, energy; None is always 'not measured'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NONE = "not measured"
NBSP = "\u00a0"  # keeps a number and its unit on one line


def share(value: float | None) -> str:
    """0.632 -> '63.2 %'."""
    return NONE if value is None else f"{100 * value:.1f}{NBSP}%"


def points(value: float) -> str:
    """A difference of two shares in percentage points, with its sign: 0.173 -> '+17.3'."""
    return f"{100 * value:+.1f}".replace("-", "−")


def plain(value: float | None) -> str:
    """Four significant digits, thousands separated: 1234567 -> '1,234,567', 0.00321 -> '0.00321'."""
    if value is None:
        return NONE
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def duration(value: float | None) -> str:
    """Seconds -> '3.2 s', '5 min 12 s', '2 h 5 min'."""
    if value is None:
        return NONE
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def size(value: float | None) -> str:
    """Bytes -> '812 B', '1.4 MB', '3.2 GB' (powers of 1000)."""
    if value is None:
        return NONE
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def joules(value: float | None) -> str:
    """Joules -> '950 J', '12.3 kJ (3.4 Wh)', '4.1 MJ (1.1 kWh)'."""
    if value is None:
        return NONE
    if value < 1e3:
        return f"{value:.0f} J"
    amount, unit = (value / 1e6, "MJ") if value >= 1e6 else (value / 1e3, "kJ")
    hours = value / 3600
    return f"{amount:.3g} {unit} ({hours / 1e3:.3g} kWh)" if hours >= 1e3 else f"{amount:.3g} {unit} ({hours:.3g} Wh)"


def money(value: float | None) -> str:
    """An amount in the user's own currency, with as many digits as a small sum needs."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.2g}"


def quantity(value: Any, unit: str) -> str:
    """A value in the words of its unit: 's', 'bytes', 'J', 'money', 'share', or the plain number with the unit behind it."""
    if value is None or not isinstance(value, (int, float)) or isinstance(value, bool):
        return NONE if value is None else {True: "yes", False: "no"}.get(value, str(value))
    special = {"s": duration, "bytes": size, "J": joules, "money": money, "share": share}
    if unit in special:
        return special[unit](value)
    return f"{plain(value)} {unit}".strip()


def score(cell: Mapping[str, Any] | None, style: str) -> str:
    """The value of a score: '63.2 %' or '1.432'."""
    if not cell:
        return NONE
    return share(cell["value"]) if style == "share" else _digits(cell["value"], cell["value"])


def interval(cell: Mapping[str, Any] | None, style: str) -> str:
    """The 95 % interval of a score: '58.9–67.3 %' or '1.401–1.463'; '' when there is none."""
    if not cell or not cell["ci95"]:
        return ""
    low, high = cell["ci95"]
    if style == "share":
        return f"{100 * low:.1f}–{100 * high:.1f}{NBSP}%"
    return f"{_digits(low, cell['value'])}–{_digits(high, cell['value'])}"


def _digits(value: float, scale: float) -> str:
    """As many decimals as give `scale` four significant digits, so that a value and its interval line up."""
    places = 3 - math.floor(math.log10(abs(scale))) if scale else 3
    return f"{value:,.{min(max(places, 0), 9)}f}"


def count(value: Any) -> str:
    """A sample size: '1,000', or '?' where it was not recorded."""
    return f"{int(value):,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "?"
