"""What runs the model: rows in, logits out, keys and values in blocks that the engine hands out.

The law of every runner: the logits of a row depend on the tokens of its sequence alone, bit for bit; not on the other
rows of the call, on how a prompt was cut into calls, on blocks shared with others, or on which blocks they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer

BLOCK_TOKENS = 32  # positions of one block of keys and values


@dataclass(frozen=True)
class Rows:
    """The rows of one model call. Rows of one sequence are consecutive, their positions rise by one."""

    tokens: np.ndarray
    """int32 (N,): token ids"""
    positions: np.ndarray
    """int32 (N,): position of each token in its sequence"""
    sequences: np.ndarray
    """int32 (N,): the row's sequence, a row of block_tables"""
    block_tables: np.ndarray
    """int32 (num_sequences, max_blocks): at [i, j] the block that holds positions 32 * j to 32 * j + 31 of sequence i"""
    wanted: np.ndarray
    """int32 (M,): rows whose logits are wanted, rising"""
    prefill: np.ndarray
    """bool (N,): whether the row reads a prompt; for runners whose arithmetic differs between the two"""


class Runner(Protocol):
    """Runs a model over a paged cache. Every call writes the keys and values of its rows before any of them attends."""

    config: DecoderConfig
    """the shape of the model"""
    weights: str
    """format of its weights while running"""
    vocab_size: int
    """number of logits a row"""
    max_seq_len: int
    """positions that a sequence may have"""
    device: torch.device
    """where the logits lie"""
    uniform: bool
    """whether a row's bits are the same read as prompt or decoded; then every full block may be shared, else those of prompt rows only"""

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, num_blocks blocks of BLOCK_TOKENS positions; what an earlier one held is lost."""

    def block_bytes(self) -> int:
        """Return the bytes of keys and values that one block takes."""

    def forward(self, rows: Rows) -> torch.Tensor:
        """Return the logits of the wanted rows, float32 (M, V), valid until the next call."""

    def hidden(self, rows: Rows) -> torch.Tensor:
        """Return the hidden states after the last norm of the wanted rows, float32 (M, D)."""

    def reload(self, model: Transformer) -> None:
        """Run the weights of another model of the same configuration from now on; what the cache holds is stale then."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each pair (source, target): for forks whose last block is part full."""


def check_same_shape(model: Transformer, config: DecoderConfig) -> None:
    """Raise UserError for a model that a runner made for another configuration cannot take over."""
    if model.config != config:
        raise UserError(f"reload takes a model of the same configuration; this one has {model.config}, the runner {config}.")
