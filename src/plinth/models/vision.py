"""The vision transformer: an image as a sequence of patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.models.bidirectional import LayerNorm
from plinth.models.tower import Activation, Tower, check_tower


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer as CLIP has it: pre-norm, a class token in front, learnt positions."""

    image_size: int = 32
    """edge of the square images in pixels; a multiple of patch_size"""
    patch_size: int = 4
    """edge of a patch in pixels"""
    num_channels: int = 3
    """colours of a pixel"""
    hidden_size: int = 128
    """width of the residual stream"""
    num_layers: int = 4
    """number of blocks"""
    num_heads: int = 4
    """attention heads a block; divides hidden_size"""
    intermediate_size: int = 512
    """width of the feed-forward layer"""
    activation: Activation = "gelu"
    """gelu, gelu_tanh (its approximation by tanh), or quick_gelu (OpenAI's CLIP)"""
    norm_eps: float = 1e-5
    """added to the variance before the root"""

    def __post_init__(self) -> None:
        check_tower("vision.", self)
        if self.patch_size < 1 or self.image_size % self.patch_size or self.image_size < self.patch_size:
            raise UserError(
                f"vision.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}. "
                "Use a patch_size that divides it, for instance 4 or 8 for 32 pixels."
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class VisionTransformer(nn.Module):
    """Patches and a class token through a stack of blocks.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929.  Differs as CLIP does: a normalisation before the first block, no biases in the
    embedding of patches.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.class_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embed = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embed = nn.Embedding(config.num_patches + 1, config.hidden_size)
        self.first_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = Tower(config)
        self.final_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, pixels_BCSS: torch.Tensor, layer: int = -1) -> torch.Tensor:
        """Return hidden states, the class token's first, (B, 1 + patches, D).

        `layer` counts as transformers does: 0 before the first block, -1 behind the last, -2 behind the last but one. No
        normalisation follows.
        """
        count = layer if layer >= 0 else self.config.num_layers + 1 + layer
        return self.layers(self.embedded(pixels_BCSS), num_layers=count)

    def pooled(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        """Return the normalised state of the class token, (B, D)."""
        return self.final_norm(self(pixels_BCSS)[:, 0])

    def embedded(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        """Return what the first block takes, (B, 1 + patches, D). Raises UserError for images of another size."""
        config = self.config
        if tuple(pixels_BCSS.shape[1:]) != (config.num_channels, config.image_size, config.image_size):
            raise UserError(
                f"images of shape {tuple(pixels_BCSS.shape[1:])} do not fit vision.image_size={config.image_size} with "
                f"{config.num_channels} channels. Resize them first (plinth.data.images.ImageProcessor)."
            )
        # A patch is a row of one product: what the convolution computes, without its own way of laying out memory.
        edge, size = config.patch_size, config.image_size // config.patch_size
        patches = pixels_BCSS.unflatten(3, (size, edge)).unflatten(2, (size, edge)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        weight = self.patch_embed.weight.flatten(1)
        x = F.linear(patches.to(weight.dtype), weight)
        x = torch.cat((self.class_embed.expand(x.shape[0], 1, -1), x), 1) + self.position_embed.weight
        return self.first_norm(x)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> VisionTransformer:
        """Draw the weights: embeddings with deviation D^-1/2, patches with 1/sqrt(fan_in), the blocks as `Tower` does."""
        width = self.config.hidden_size**-0.5
        self.class_embed.normal_(0.0, width, generator=generator)
        self.patch_embed.weight.normal_(0.0, self.patch_embed.weight[0].numel() ** -0.5, generator=generator)
        self.position_embed.weight.normal_(0.0, width, generator=generator)
        self.layers.init_weights(generator)
        self.first_norm.reset_parameters()
        self.final_norm.reset_parameters()
        return self

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        return dict(self.layers.matrix_parts("layers."))

    @torch.no_grad()
    def attention_weights(self, pixels_CSS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what each position of one image attends to, {"vision": fp32 (L, H, T, S)}; position 0 is the class token."""
        return {"vision": self.layers.attention_weights(self.embedded(pixels_CSS[None]))[:, 0]}
