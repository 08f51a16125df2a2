"""The numbers in a text, exact: whole, decimal, with thousands in threes, as a fraction or in percent."""

from __future__ import annotations

import re
from fractions import Fraction

MOST_DIGITS = 300

_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?![\d,]*\d)|\d{{1,{MOST_DIGITS}}})"
_PLAIN = rf"(?:{_DIGITS}(?:\.\d{{1,{MOST_DIGITS}}})?|\.\d{{1,{MOST_DIGITS}}})(?:[eE][-+]?\d{{1,3}}(?!\d))?"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])[-+])?(?<![\d.])({_PLAIN})(?:\s*/\s*({_PLAIN}))?(\s*%)?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def numbers_in(text: str) -> list[Fraction]:
    """Return the numbers of a text in order: 1,234 and 3/4 and 12.5% and -2e3 and \\frac{1}{2} are one each.

    A sign belongs to a number unless something stands right before it: 5-3 holds 5 and 3. A fraction with the denominator 0 is none.
    """
    found = []
    for match in _NUMBER.finditer(_FRACTION.sub(r"\1/\2", text.replace("−", "-"))):
        value, below, percent = _value(match[1]), _value(match[2]) if match[2] else Fraction(1), Fraction(100 if match[3] else 1)
        if below:
            found.append((-value if match[0].startswith("-") else value) / below / percent)
    return found


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
