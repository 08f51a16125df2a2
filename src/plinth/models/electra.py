"""ELECTRA in pretraining: a small generator that fills masks, and the encoder that tells the tokens it put in from the text's own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from plinth.config import UserError
from plinth.models.encoder import EncoderModel, init_parameter
from plinth.models.encoder_config import EncoderConfig


def generator_config(config: EncoderConfig, share: float) -> EncoderConfig:
    """Return the generator of a discriminator: as deep, `share` as wide, on the same embeddings.

    Source: Clark et al. 2020, arXiv:2003.10555, section 3.2: a quarter to a half as wide works best.
    """
    if not 0 < share <= 1:
        raise UserError(f"generator_share={share} must lie in (0, 1]. The paper found a quarter to a half best.")
    heads = max(1, round(config.num_heads * share))
    return replace(
        replace(config, published_as="electra").with_head("mlm"),
        hidden_size=heads * config.head_dim,
        num_heads=heads,
        intermediate_size=max(1, round(config.intermediate_size * share)),
        embedding_size=config.embedding_width,
    )


class Electra(nn.Module):
    """Generator and discriminator with one set of embeddings; the discriminator is what is kept and finetuned."""

    def __init__(self, config: EncoderConfig, generator_share: float = 0.25):
        super().__init__()
        self.discriminator, self.generator = (EncoderModel(shape) for shape in self.shapes(config, generator_share))
        self.generator.encoder.embed = self.discriminator.encoder.embed
        self.config = self.discriminator.config

    @staticmethod
    def shapes(config: EncoderConfig, generator_share: float) -> tuple[EncoderConfig, EncoderConfig]:
        """Return the shapes of discriminator and generator."""
        discriminator = replace(config, published_as="electra").with_head("rtd")
        return discriminator, generator_config(discriminator, generator_share)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> Electra:
        """Draw the weights of both, the shared ones once."""
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, generator)
        return self

    def forward(self, tokens_BT: torch.Tensor, mask=None) -> torch.Tensor:
        """Return the discriminator's hidden states (B, T, D)."""
        return self.discriminator(tokens_BT, mask)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks of both, for who compiles them."""
        return [*self.discriminator.layers, *self.generator.layers]

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices of both by parameter name."""
        parts = {}
        for part in ("discriminator", "generator"):
            parts |= {f"{part}.{name}": rows for name, rows in getattr(self, part).matrix_parts().items()}
        return parts

    def attention_weights(self, tokens_T: torch.Tensor, mask=None) -> dict[str, torch.Tensor]:
        """Return the discriminator's attention weights."""
        return self.discriminator.attention_weights(tokens_T, mask)
