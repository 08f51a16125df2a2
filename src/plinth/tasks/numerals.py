"""Numerals in English and German: parallel text that is made, not read, whose words change order and join on the way.

"six hundred twenty-seven" is "sechshundertsiebenundzwanzig": units before tens, all of it one word. So a model that gets
numbers right which it has not seen has learnt to align, not to copy.
"""

from __future__ import annotations

import numpy as np

from plinth.config import UserError

LIMIT = 1_000_000  # numbers below it have a name here

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn"
).split()
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english(number: int) -> str:
    """Return the name of a number from 0 to 999,999."""
    if number < 20:
        return ENGLISH[number]
    if number < 100:
        tens, units = divmod(number, 10)
        return ENGLISH_TENS[tens - 2] + (f"-{ENGLISH[units]}" if units else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, size)
    return f"{english(head)} {name}" + (f" {english(rest)}" if rest else "")


def german(number: int) -> str:
    """Return the German name of a number from 0 to 999,999."""
    name = _german(number)
    return name + "s" if number % 100 == 1 else name  # eins stands alone or last, ein before another part


def _german(number: int) -> str:
    if number < 20:
        return GERMAN[number]
    if number < 100:
        tens, units = divmod(number, 10)
        return (f"{GERMAN[units]}und" if units else "") + GERMAN_TENS[tens - 2]
    size, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    head, rest = divmod(number, size)
    return f"{_german(head)}{name}" + (_german(rest) if rest else "")


def numeral_pairs(count: int, seed: int = 0, below: int = LIMIT) -> list[tuple[str, str]]:
    """Return the English and German names of `count` different numbers below a limit, drawn at random.

    More of one seed begin with fewer of it, so that a tail can be held out. Raises UserError where there are not so many numbers.
    """
    if not 0 < count <= below <= LIMIT:
        raise UserError(f"count={count} numbers below {below}: there must be as many, and they have names below {LIMIT}.")
    drawn = np.random.Generator(np.random.PCG64([seed, below])).permutation(below)[:count]
    return [(english(int(number)), german(int(number))) for number in drawn]
