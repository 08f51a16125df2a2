"""The reward model: a decoder whose head gives a text one number, read at its last token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.shared_rows import SharedRows


@dataclass(frozen=True)
class RewardConfig:
    """A decoder, and what is added to its scores."""

    decoder: DecoderConfig
    """the trunk"""
    bias: float = 0.0
    """added to every score; set by normalisation, as no comparison of two answers to a prompt can learn it"""

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers

    @property
    def max_seq_len(self) -> int:
        return self.decoder.max_seq_len


class RewardModel(nn.Module):
    """A decoder with a head of one number in place of the vocabulary's; `forward` gives each row's score.

    Differs from transformers' ForSequenceClassification: which token is the last is told by position, not found by comparing tokens
    with the padding's, so a text may end with the token that others are padded with.
    """

    def __init__(self, config: RewardConfig):
        super().__init__()
        self.config = config
        self.trunk = Transformer(config.decoder)
        self.trunk.head = None  # the vocabulary's
        self.score = nn.Linear(config.decoder.hidden_size, 1, bias=False)

    @classmethod
    def from_decoder(cls, decoder: Transformer, generator: torch.Generator) -> RewardModel:
        """Return a reward model on a decoder's weights, which are taken, not copied; its head is drawn as `init_head` does."""
        model = cls(RewardConfig(decoder.config))
        model.trunk.load_state_dict({name: t for name, t in decoder.state_dict().items() if name != "head.weight"}, assign=True)
        model.trunk.requires_grad_(True)
        return model.init_head(generator)

    @torch.no_grad()
    def init_head(self, generator: torch.Generator) -> RewardModel:
        """Draw the head's weights from N(0, 1/(D + 1)), and let the bias be 0.

        Source: the code of Ziegler et al. 2019, arXiv:1909.08593, where the bias is learnt too.
        """
        self.score.weight.normal_(0.0, (self.score.in_features + 1) ** -0.5, generator=generator)
        self.config = replace(self.config, bias=0.0)
        return self

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> RewardModel:
        """Draw all weights: the trunk's as a decoder's, the head's as `init_head` does."""
        self.trunk.init_weights(generator)
        return self.init_head(generator)

    def forward(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Return each row's score, fp32 (B,), read at its last token; rows begin at place 0 and are padded on the right with anything."""
        return self.read(self.trunk(tokens_BT, wanted_BR=lengths_B[:, None] - 1))[:, 0]

    def forward_shared(self, tokens_BL: torch.Tensor, rows: SharedRows, lengths_BR: torch.Tensor) -> torch.Tensor:
        """Return `forward`'s scores (B, R) of sequences that lie in rows in which what they begin with stands once."""
        last_BR = rows.places_BRT.gather(2, (lengths_BR - 1)[..., None])[..., 0]
        return self.read(self.trunk(tokens_BL, shared=rows, wanted_BR=last_BR))

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores of hidden states (..., D), fp32 (...)."""
        return (hidden.float() * self.score.weight[0].float()).sum(-1) + self.config.bias

    @torch.no_grad()
    def rescale(self, gain: float, shift: float) -> None:
        """Let every score s become gain · s + shift."""
        self.score.weight.mul_(gain)
        self.config = replace(self.config, bias=gain * self.config.bias + shift)

    @property
    def layers(self) -> Any:
        """The blocks, for who compiles them."""
        return self.trunk.layers

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        return {f"trunk.{name}": rows for name, rows in self.trunk.matrix_parts().items()}
