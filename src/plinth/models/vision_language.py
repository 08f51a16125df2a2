"""A decoder that sees: patches of an image, projected into its stream, stand among the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from plinth.config import UserError
from plinth.models.bidirectional import BiasedLinear
from plinth.models.config import DecoderConfig
from plinth.models.tower import ACTIVATIONS, Activation
from plinth.models.transformer import Transformer
from plinth.models.vision import VisionConfig, VisionTransformer


@dataclass(frozen=True)
class VisionLanguageConfig:
    """LLaVA: a vision tower, a projector of two layers, and a decoder."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """shape of the vision tower"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """shape of the decoder"""
    image_id: int = 6
    """token whose places the patches of an image take, one token a patch"""
    vision_layer: int = -2
    """whose hidden states are projected: -2 is behind the last block but one"""
    class_token: bool = False
    """whether the class token's state is one of those that take a place"""
    projector_activation: Activation = "gelu"
    """between the projector's two layers"""
    projector_bias: bool = True
    """whether the projector's layers have biases"""

    def __post_init__(self) -> None:
        if not 0 <= self.image_id < self.decoder.vocab_size:
            raise UserError(f"image_id={self.image_id} is no id below decoder.vocab_size={self.decoder.vocab_size}.")
        layers = self.vision.num_layers
        if not -layers - 1 <= self.vision_layer <= layers:
            raise UserError(f"vision_layer={self.vision_layer} is no layer of a tower with {layers}. Use {-layers - 1} to {layers}.")
        if self.projector_activation not in ACTIVATIONS:
            raise UserError(f"projector_activation={self.projector_activation!r} is not one of {', '.join(ACTIVATIONS)}.")
        if self.image_tokens >= self.max_seq_len:
            raise UserError(f"an image takes {self.image_tokens} tokens, decoder.max_seq_len={self.max_seq_len}. Use larger patches.")

    @property
    def image_tokens(self) -> int:
        """How many tokens an image takes."""
        return self.vision.num_patches + self.class_token

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.decoder.max_seq_len


class Projector(nn.Module):
    """Two layers from the width of the tower to that of the decoder."""

    def __init__(self, config: VisionLanguageConfig):
        super().__init__()
        width, bias = config.decoder.hidden_size, config.projector_bias
        self.first = BiasedLinear(config.vision.hidden_size, width, bias=bias)
        self.second = BiasedLinear(width, width, bias=bias)
        self.activation = ACTIVATIONS[config.projector_activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(x)))


class VisionLanguageModel(nn.Module):
    """Tokens and images to hidden states of the decoder.

    Source: Liu et al. 2023, arXiv:2304.08485, and 2024, arXiv:2310.03744 (LLaVA 1.5: the projector has two layers).
    """

    def __init__(self, config: VisionLanguageConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(config)
        self.decoder = Transformer(config.decoder)

    def image_rows(self, pixels_NCSS: torch.Tensor) -> torch.Tensor:
        """Return what stands for each image in the decoder's stream, (N, image_tokens, D)."""
        states = self.vision(pixels_NCSS, self.config.vision_layer)
        return self.projector(states if self.config.class_token else states[:, 1:])

    def forward(self, tokens_BT: torch.Tensor, pixels_NCSS: torch.Tensor | None = None, routings=None) -> torch.Tensor:
        """Return the decoder's hidden states, (B, T, D); the places of image_id take the images' rows, in order.

        What the decoder's routers of experts decide, where it has them, is appended to `routings`.
        Raises UserError when there are more or fewer such places than the images fill.
        """
        return self.decoder(tokens_BT, routings=routings, embedded_BTD=self.embedded(tokens_BT, pixels_NCSS))

    def embedded(self, tokens_BT: torch.Tensor, pixels_NCSS: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings of the tokens, with the images' rows in their places, (B, T, D)."""
        embedded_BTD = self.decoder.embed(tokens_BT)
        places_BT = tokens_BT == self.config.image_id
        count = 0 if pixels_NCSS is None else len(pixels_NCSS)
        if (found := int(places_BT.sum())) != count * self.config.image_tokens:
            raise UserError(
                f"the tokens have {found} places for images, but {count} image(s) fill {count * self.config.image_tokens}: "
                f"{self.config.image_tokens} each."
            )
        if pixels_NCSS is None or not count:
            return embedded_BTD
        rows = self.image_rows(pixels_NCSS).to(embedded_BTD.dtype)
        return embedded_BTD.masked_scatter(places_BT[..., None], rows)

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix, shape (V, D)."""
        return self.decoder.output_weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return next-token scores, shape (..., V)."""
        return self.decoder.logits(hidden)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> VisionLanguageModel:
        """Draw the weights of all parts."""
        self.vision.init_weights(generator)
        self.init_projector(generator)
        self.decoder.init_weights(generator)
        return self

    @torch.no_grad()
    def init_projector(self, generator: torch.Generator) -> None:
        """Draw the projector: the first layer keeps the scale of its input, the second gives that of the decoder's embeddings."""
        for layer, gain in ((self.projector.first, 1.0), (self.projector.second, self.decoder.embed.weight.std().item() or 1.0)):
            layer.weight.normal_(0.0, gain * layer.in_features**-0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices that are trained, by parameter name, each with the row counts of the projections fused in it."""
        width = self.config.decoder.hidden_size
        parts = {"projector.first.weight": (width,), "projector.second.weight": (width,)}
        for prefix, part in (("vision.", self.vision), ("decoder.", self.decoder)):
            parts |= {prefix + name: rows for name, rows in part.matrix_parts().items()}
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: rows for name, rows in parts.items() if name in trained}

    @torch.no_grad()
    def attention_weights(self, tokens_T: torch.Tensor, pixels_CSS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the decoder and the tower attend to, {"self", "vision"}: fp32 (L, H, T, S); a text with one image."""
        embedded_BTD = self.embedded(tokens_T[None], pixels_CSS[None])
        return {**self.decoder.attention_weights(tokens_T, embedded_BTD), **self.vision.attention_weights(pixels_CSS)}
