"""What restricts the next token of a request: the interface between the engine and a grammar."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The state of one completion under a grammar; the engine asks before each token and tells what was chosen."""

    def allowed(self) -> np.ndarray | None:
        """Return the tokens that may come next, uint8 (ceil(V / 8),): bit i % 8 of byte i // 8, counted from the lowest, is token i.

        None = every token. An end token may come only where its own bit is set. The array is read before the next call.
        """

    def advance(self, token: int) -> None:
        """Take the token that was chosen, one of those allowed; an end token is not told."""

    def forced(self) -> list[int]:
        """Return the tokens that must come now, one after another; [] where there is a choice. Changes nothing."""

    def finished(self) -> bool:
        """Return whether nothing may follow: the engine ends the request with 'stop'."""

    def copy(self) -> Constraint:
        """Return a constraint in the same state that moves on by itself."""
