"""A constitution: the principles that a model judges, criticises and revises answers by, one a line of a text file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from plinth.config import UserError, read_bytes


def read_principles(path: Path) -> list[str]:
    """Read one principle a line; blank lines and what follows a # at a line's beginning are left out.

    Raises UserError when the file is absent, no UTF-8, or holds none.
    """
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text. A constitution is a text file with one principle a line.") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"{path} holds no principle. Write one a line.")
    return found


def draw_principles(principles: list[str], count: int, seed: int, *place: int) -> list[str]:
    """Return a principle for each of `count` things, drawn by seed and place; nothing where there is none to draw from.

    Source: Bai et al. 2022 (constitutional AI), arXiv:2212.08073, sections 3.1 and 4.1.
    """
    rng = np.random.Generator(np.random.PCG64([seed, *place]))
    return [principles[int(i)] for i in rng.integers(len(principles), size=count)] if principles else []
