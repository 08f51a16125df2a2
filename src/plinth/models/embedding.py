"""Tables of vectors that tokens name."""

from __future__ import annotations

import torch
from torch import nn

from plinth.ops.linear import embedding


class Embedding(nn.Embedding):
    """PyTorch's table, whose gradient costs a training step the rows that were read, not the whole table."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens' vectors, shape (..., D)."""
        return embedding(tokens, self.weight)
