"""Sums and differences with one right answer each, and parts of a set that share no problem."""

from __future__ import annotations

import numpy as np

from plinth.config import UserError

SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


def arithmetic_problems(count: int, seed: int = 0, below: int = 100) -> list[tuple[str, str]]:
    """Return `count` different problems of two numbers below a limit as (question, answer), such as ("37-58=", "-21").

    More of one seed begin with fewer of it, so that a tail can be held out. Raises UserError where there are not so many problems.
    """
    if not 0 < count <= len(SIGNS) * below**2:
        raise UserError(f"count={count} problems: with numbers below {below} there are {len(SIGNS) * below**2}.")
    drawn = np.random.Generator(np.random.PCG64([seed, below])).permutation(len(SIGNS) * below**2)[:count]
    problems = []
    for number in drawn.tolist():
        sign, (a, b) = list(SIGNS)[number // below**2], divmod(number % below**2, below)
        problems.append((f"{a}{sign}{b}=", str(SIGNS[sign](a, b))))
    return problems


def arithmetic_rows(problems: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return the problems as rows of a file that `plinth grpo` and `plinth sft` read."""
    return [{"prompt": question, "answer": answer, "verifier": "exact"} for question, answer in problems]
