"""What is computed from an encoder's hidden states: the token under a mask, replaced tokens, labels, spans.

BERT and ELECTRA have the same heads in slightly different shapes; config.published_as decides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from plinth.models.bidirectional import BiasedLinear, LayerNorm
from plinth.models.encoder_config import EncoderConfig


class MaskedTokenHead(nn.Module):
    """Scores of the vocabulary: a layer, its normalisation, and the product with the embeddings plus a bias.

    Source: Devlin et al. 2018, arXiv:1810.04805; Clark et al. 2020, arXiv:2003.10555, whose layer leads to the embeddings' width.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.embedding_width
        self.dense = BiasedLinear(config.hidden_size, width)
        self.norm = LayerNorm(width, config.norm_eps)
        self.decoder = None if config.tie_embeddings else nn.Linear(width, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = "gelu" if config.published_as == "electra" else config.activation  # ELECTRA's generator has gelu always

    def forward(self, hidden: torch.Tensor, embedding_VX: torch.Tensor) -> torch.Tensor:
        """Return scores (..., V); the embeddings count where the matrix is tied to them."""
        weight = embedding_VX if self.decoder is None else self.decoder.weight
        return F.linear(self.norm(activate(self.activation, self.dense(hidden))), weight, self.bias)


class ReplacedTokenHead(nn.Module):
    """The logit, for each position, that its token is not the text's own.  Source: Clark et al. 2020, arXiv:2003.10555, section 2."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = BiasedLinear(config.hidden_size, config.hidden_size)
        self.out = BiasedLinear(config.hidden_size, 1)
        self.activation = config.activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out(activate(self.activation, self.dense(hidden)))[..., 0]


class ClassifierHead(nn.Module):
    """Scores of the labels of a text from its first position; ELECTRA has a layer before, where BERT has its pooler."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        is_electra = config.published_as == "electra"
        self.dense = BiasedLinear(config.hidden_size, config.hidden_size) if is_electra else None
        self.out = BiasedLinear(config.hidden_size, len(config.labels))

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        return self.out(pooled_BD if self.dense is None else F.gelu(self.dense(pooled_BD)))


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the named function of x."""
    if name.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.relu(x) if name == "relu" else F.silu(x)


def encoder_head(config: EncoderConfig) -> nn.Module | None:
    """Return the head that a configuration names; None for head=none."""
    kinds = {"mlm": MaskedTokenHead, "rtd": ReplacedTokenHead, "classify": ClassifierHead}
    if config.head in kinds:
        return kinds[config.head](config)
    return None if config.head == "none" else BiasedLinear(config.hidden_size, config.num_outputs)
