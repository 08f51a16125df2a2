"""What guesses the next tokens of a request, so that the model can check several in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Draft:
    """A guess at the tokens that come next."""

    tokens: list[int]
    """token ids, may be fewer than asked for, or none"""
    probabilities: np.ndarray | None = None
    """float64 (len(tokens), V): the distribution each token was drawn from; None = the guess is certain (all mass on the token)"""


NO_DRAFT = Draft([])


class Drafter(Protocol):
    """Guesses for one request. What it returns may depend on the tokens so far and on the request's seed, on nothing else."""

    def propose(self, tokens: Sequence[int], count: int) -> Draft:
        """Return a guess of at most `count` tokens that follow `tokens` (prompt and completion so far)."""
