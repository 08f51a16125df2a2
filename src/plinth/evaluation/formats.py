"""Numbers as people read them: shares, times, sizes, energy; None is always 'not measured'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "not measured"


def share(value: float | None) -> str:
    """0.632 -> '63.2 %'."""
    return NONE if value is None else f"{100 * value:.1f} %"


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


def money(value: float | None, currency: str = "") -> str:
    """An amount with its currency, with as many digits as a small sum needs."""
    if value is None:
        return NONE
    return f"{value:.2f} {currency}".strip() if value >= 1 else f"{value:.2g} {currency}".strip()


def quantity(value: Any, unit: str, currency: str = "") -> str:
    """A value in the words of its unit: 's', 'bytes', 'J', 'money', or the plain number with the unit behind it."""
    if value is None or isinstance(value, (str, bool)):
        return NONE if value is None else str(value)
    special = {"s": duration, "bytes": size, "J": joules}
    if unit in special:
        return special[unit](value)
    if unit == "money":
        return money(value, currency)
    return plain(value) if unit in ("count", "") else f"{plain(value)} {unit}"


def score(cell: Mapping[str, Any] | None, style: str) -> str:
    """The value of a score: '63.2 %' or '1.432'."""
    if not cell:
        return NONE
    return share(cell["value"]) if style == "share" else f"{cell['value']:.4g}"


def interval(cell: Mapping[str, Any] | None, style: str) -> str:
    """The 95 % interval of a score: '58.9–67.3 %' or '1.401–1.463'; '' when there is none."""
    if not cell or not cell["ci95"]:
        return ""
    low, high = cell["ci95"]
    return f"{100 * low:.1f}–{100 * high:.1f} %" if style == "share" else f"{low:.4g}–{high:.4g}"


def count(value: Any) -> str:
    """A sample size: '1,000', or '?' where it was not recorded."""
    return f"{int(value):,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "?"
