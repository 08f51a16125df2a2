"""How a recurrent decoder looks at its source: additive (Bahdanau) and multiplicative (Luong) attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from plinth.config import UserError
from plinth.ops.linear import linear
from plinth.ops.recurrent import attend

Attention = Literal["none", "additive", "multiplicative"]
Score = Literal["dot", "general"]


class AdditiveAttention(nn.Module):
    """score = v · tanh(W [query; key] + b), with W cut into its part for the query and that for the keys, which runs once.

    Source: Bahdanau, Cho and Bengio 2014, arXiv:1409.0473, section A.1.2.  Differs: a bias.
    """

    def __init__(self, query_size: int, key_size: int, inner_size: int):
        super().__init__()
        self.query = nn.Linear(query_size, inner_size, bias=False)
        self.key = nn.Linear(key_size, inner_size)
        self.score = nn.Linear(inner_size, 1, bias=False)

    def keys(self, values_BSD: torch.Tensor) -> torch.Tensor:
        """Return what of the scores depends on the source alone."""
        return self.key(values_BSD)

    def forward(self, query_BTD, keys_BSF, values_BSD, mask_BS=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return contexts (B, T, D) and weights (B, T, S)."""
        inner_BTSF = torch.tanh(linear(query_BTD, self.query.weight)[:, :, None] + keys_BSF[:, None])
        return attend(self.score(inner_BTSF)[..., 0], values_BSD, mask_BS)


class MultiplicativeAttention(nn.Module):
    """score = query · key (dot), or query · W key (general).

    Source: Luong, Pham and Manning 2015, arXiv:1508.04025, eq. 8 (global attention).
    """

    def __init__(self, query_size: int, key_size: int, score: Score):
        super().__init__()
        if score == "dot" and query_size != key_size:
            raise UserError(
                f"score=dot compares the decoder's {query_size} numbers with the encoder's {key_size}; they must be as many. "
                "Use score=general, or an encoder of one direction."
            )
        self.key = nn.Linear(key_size, query_size, bias=False) if score == "general" else None

    def keys(self, values_BSD: torch.Tensor) -> torch.Tensor:
        """Return what of the scores depends on the source alone."""
        return values_BSD if self.key is None else self.key(values_BSD)

    def forward(self, query_BTD, keys_BSD, values_BSD, mask_BS=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return contexts (B, T, D) and weights (B, T, S)."""
        return attend(torch.bmm(query_BTD, keys_BSD.transpose(1, 2)), values_BSD, mask_BS)
