"""What changes single logits before the temperature: bias, penalties for tokens that came before, forbidden tokens.

All functions work in place on float32 logits (N, V) and name entries by a row and a token id, two int64 tensors (E,), no
entry twice; so one call serves all rows, and each entry is computed by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch


class TokenCounts:
    """Which tokens a request has seen, and how often each is in its completion."""

    def __init__(self, prompt: Iterable[int] = ()):
        ids = np.unique(np.fromiter(prompt, dtype=np.int64))
        self._place = {int(token): i for i, token in enumerate(ids)}
        self._ids, self._counts = ids, np.zeros(len(ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """Count one more of a token of the completion."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            more = max(16, len(self._ids))
            self._ids = np.concatenate([self._ids, np.zeros(more, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.float32)])
        self._ids[place] = token
        self._counts[place] += 1.0

    def copy(self) -> TokenCounts:
        """Return counts that go on by themselves."""
        twin = TokenCounts()
        twin._place, twin._ids, twin._counts = dict(self._place), self._ids.copy(), self._counts.copy()
        return twin

    @property
    def ids(self) -> np.ndarray:
        """int64 (E,): every token of prompt and completion once"""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> np.ndarray:
        """float32 (E,): how often each of `ids` is in the completion"""
        return self._counts[: len(self._place)]


def add_bias(logits_NV: torch.Tensor, rows_E: torch.Tensor, ids_E: torch.Tensor, bias_E: torch.Tensor) -> None:
    """Add a number to each entry."""
    logits_NV[rows_E, ids_E] += bias_E


def penalise_repetition(logits_NV: torch.Tensor, rows_E: torch.Tensor, ids_E: torch.Tensor, penalty_E: torch.Tensor) -> None:
    """Divide positive logits by the penalty and multiply negative ones with it.

    Source: Keskar et al. 2019, "CTRL", arXiv:1909.05858, section 4.1.
    Differs: theirs divides negative logits too, which would make such tokens likelier; all engines multiply them.
    """
    logits_E = logits_NV[rows_E, ids_E]
    logits_NV[rows_E, ids_E] = torch.where(logits_E > 0, logits_E / penalty_E, logits_E * penalty_E)


def penalise_counts(logits_NV, rows_E, ids_E, counts_E: torch.Tensor, presence_E: torch.Tensor, frequency_E: torch.Tensor) -> None:
    """Take `presence` off the logit of a token that has come, and `frequency` for each time that it has.

    Source: OpenAI's description of presence_penalty and frequency_penalty.
    """
    logits_NV[rows_E, ids_E] -= frequency_E * counts_E + presence_E * (counts_E > 0)


def forbid(logits_NV: torch.Tensor, rows_E: torch.Tensor, ids_E: torch.Tensor) -> None:
    """Make the entries impossible."""
    logits_NV[rows_E, ids_E] = -torch.inf


@lru_cache(maxsize=64)
def mask_of_ids(ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Return the mask that allows these ids only, uint8 (ceil(V / 8),)."""
    allowed = np.zeros((vocab_size + 7) // 8 * 8, dtype=np.uint8)
    allowed[list(ids)] = 1
    return np.packbits(allowed, bitorder="little")
