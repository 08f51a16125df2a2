"""What a user is willing to spend: seconds, FLOPs or tokens, written as `10m`, `3e14flops` or `5e6tokens`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from plinth.config import UserError, nearest

SECONDS = {
    "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0,
    "m": 60.0, "min": 60.0, "mins": 60.0, "minute": 60.0, "minutes": 60.0,
    "h": 3600.0, "hour": 3600.0, "hours": 3600.0,
    "d": 86400.0, "day": 86400.0, "days": 86400.0,
}  # fmt: skip
PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
COUNTED = {"flop": "flops", "flops": "flops", "token": "tokens", "tokens": "tokens"}
FORMS = "Write minutes, seconds or hours (10m, 90s, 1h30m), FLOPs (3e14flops, 300Tflops) or tokens (5e6tokens, 5Mtokens)"
PART = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """An amount of one of three things."""

    kind: Literal["time", "flops", "tokens"]
    """what is limited: training time, training FLOPs, or tokens of pretraining"""
    value: float
    """seconds, FLOPs or tokens"""

    def __str__(self) -> str:
        return format_seconds(self.value) if self.kind == "time" else f"{self.value:.3g} {COUNTED[self.kind]}"


def parse_budget(text: str | Budget) -> Budget:
    """Read `10m`, `90s`, `1h30m`, `3e14flops`, `300Tflops`, `5e6tokens` or `5Mtokens`.

    Raises UserError that quotes the text, says what is wrong and lists the accepted forms.
    """
    if isinstance(text, Budget):
        return text
    parts = _split(text)
    units = [unit.lower() for _, unit in parts]
    if all(unit in SECONDS for unit in units):
        budget = Budget("time", sum(value * SECONDS[unit] for (value, _), unit in zip(parts, units, strict=True)))
    elif len(parts) == 1:
        budget = _counted(text, parts[0][0], units[0])
    else:
        raise UserError(f"budget={text!r} mixes units that do not add up. {FORMS}.")
    if not math.isfinite(budget.value) or budget.value <= 0:
        raise UserError(f"budget={text!r} is not a positive amount. {FORMS}.")
    return budget


def _split(text: str) -> list[tuple[float, str]]:
    parts, position = [], 0
    stripped = text.strip()
    while position < len(stripped):
        match = PART.match(stripped, position)
        if match is None:
            wrong = "has no unit" if re.fullmatch(r"[0-9.eE+-]+", stripped) else "is not an amount with a unit"
            raise UserError(f"budget={text!r} {wrong}. {FORMS}.")
        parts.append((float(match.group(1)), match.group(2)))
        position = match.end()
    if not parts:
        raise UserError(f"budget is empty. {FORMS}.")
    return parts


def _counted(text: str, value: float, unit: str) -> Budget:
    for name, kind in COUNTED.items():
        prefix = unit.removesuffix(name)
        if unit.endswith(name) and prefix in PREFIXES:
            return Budget("flops" if kind == "flops" else "tokens", value * PREFIXES[prefix])
    guess = nearest(unit, [*SECONDS, *COUNTED])
    raise UserError(f"budget={text!r}: {unit!r} is not a unit of time, flops or tokens.{guess} {FORMS}.")


def format_seconds(seconds: float) -> str:
    """Return a duration as people write it: `42 s`, `4 min`, `4 min 30 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"
