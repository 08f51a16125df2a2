"""What guesses the next tokens of a request, so that the model can check several in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses for one request; `Engine.add` takes one.

    The engine runs the guesses as rows beside the last token, draws a token at each place exactly as it would without
    them (the draw of a place depends on the seed and the place alone), and keeps the guesses as long as they equal what
    was drawn. So a guess changes how many tokens a step gives, never which.
    """

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return a guess of at most `count` tokens that follow `tokens` (prompt and completion so far); [] to pass."""

    def observe(self, proposed: int, accepted: int) -> None:
        """Hear how many of the proposed tokens were right."""
