"""How a text's states become one vector, said without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plinth.config import UserError

POOLINGS = ("concat", "last", "max", "mean")


@dataclass(frozen=True)
class PooledHeadConfig:
    """How a text's states become one vector, and what stands on it."""

    pooling: Literal["concat", "last", "max", "mean"] = "concat"
    """what stands for a text: its last state, each channel's maximum, the mean, or all three side by side"""
    hidden_size: int = 50
    """width of the layer between the pooled text and the labels; 0 for none"""
    batch_norm: bool = True
    """normalise what enters each layer over the examples of a micro-batch"""
    pooled_dropout: float = 0.4
    """share of the pooled channels dropped in training, 0 to 1"""
    hidden_dropout: float = 0.1
    """share of the hidden layer's channels dropped in training, 0 to 1"""
    chunk_tokens: int | None = 70
    """AWD-LSTM: read a text in pieces of so many tokens, gradients staying within each; none: in one piece"""
    gradient_tokens: int | None = None
    """AWD-LSTM: pieces that end before a text's last so many tokens are read and pooled, but get no gradient (default: all get one)"""
    backwards: bool = False
    """read texts from their end to their beginning, for a language model that was trained so"""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling={self.pooling!r} is unknown. Use one of {', '.join(POOLINGS)}.")
        if self.hidden_size < 0:
            raise UserError(f"hidden_size={self.hidden_size} must be 0 or more.")
        for name in ("pooled_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and less than 1.")
        for name in ("chunk_tokens", "gradient_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
