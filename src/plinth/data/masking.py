"""Hides tokens of a row for masked-token training; which ones follows from the generator, so anew in every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plinth.config import UserError
from plinth.data.rows import IGNORE


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens are hidden, and behind what."""

    share: float = 0.15
    """share of a row's tokens that are to be predicted, rounded, at least one"""
    masked: float = 0.8
    """share of these behind the mask token"""
    random: float = 0.1
    """share of these behind a random token; the rest stand as they are"""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"share={self.share} must lie between 0 and 1, for instance 0.15.")
        if self.masked < 0 or self.random < 0 or self.masked + self.random > 1 + 1e-9:
            raise UserError(f"masked={self.masked} and random={self.random} must be 0 or more, and at most 1 together.")


def mask_tokens(
    tokens_BT: np.ndarray, maskable_BT: np.ndarray, mask_id: int, ordinary: np.ndarray, config: MaskingConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return (inputs, targets): the rows with tokens hidden, and the hidden ones, IGNORE elsewhere.

    Only `maskable_BT` positions are chosen: special tokens and padding are not. `ordinary` are the ids that a random token may have.
    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1.  Differs: each row has exactly its share, so that counts do not vary.
    """
    counts = np.maximum(np.round(config.share * maskable_BT.sum(1)), maskable_BT.any(1)).astype(np.int64)
    order = np.argsort(np.where(maskable_BT, rng.random(tokens_BT.shape), 2.0), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(tokens_BT.shape[1])[None].repeat(len(tokens_BT), 0), axis=1)
    chosen = ranks < counts[:, None]
    fate = rng.random(tokens_BT.shape)
    inputs = np.where(chosen & (fate < config.masked), mask_id, tokens_BT)
    replaced = chosen & (fate >= config.masked) & (fate < config.masked + config.random)
    inputs = np.where(replaced, ordinary[rng.integers(len(ordinary), size=tokens_BT.shape)], inputs)
    return inputs, np.where(chosen, tokens_BT, IGNORE)
