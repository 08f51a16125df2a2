"""Text and images in one space: CLIP's two towers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.models.bidirectional import BiasedLinear, LayerNorm
from plinth.models.tower import Activation, Tower, check_tower
from plinth.models.vision import VisionConfig, VisionTransformer

FIRST_LOGIT_SCALE = math.log(1 / 0.07)
LARGEST_LOGIT_SCALE = math.log(100)
LEGACY_END = 2  # what the first published configurations say where the end of a text is the highest id


@dataclass(frozen=True)
class TextTowerConfig:
    """A causal transformer over a caption, as CLIP has it."""

    vocab_size: int = 4096
    """number of token ids"""
    hidden_size: int = 128
    """width of the residual stream"""
    num_layers: int = 4
    """number of blocks"""
    num_heads: int = 4
    """attention heads a block; divides hidden_size"""
    intermediate_size: int = 512
    """width of the feed-forward layer"""
    max_seq_len: int = 77
    """longest caption in tokens, the ones for its begin and end included; a longer one is cut"""
    begin_id: int = 0
    """token that begins a caption"""
    end_id: int = 5
    """token that ends a caption; its state stands for the whole"""
    activation: Activation = "gelu"
    """gelu, gelu_tanh (its approximation by tanh), or quick_gelu (OpenAI's CLIP)"""
    norm_eps: float = 1e-5
    """added to the variance before the root"""

    def __post_init__(self) -> None:
        check_tower("text.", self)
        if self.vocab_size < 1 or self.max_seq_len < 2:
            raise UserError(f"text.vocab_size={self.vocab_size} must be at least 1, text.max_seq_len={self.max_seq_len} at least 2.")
        for name in ("begin_id", "end_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UserError(f"text.{name}={getattr(self, name)} is no id below vocab_size={self.vocab_size}.")


@dataclass(frozen=True)
class DualEncoderConfig:
    """CLIP: a text tower and a vision tower that end in vectors of one length."""

    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    """shape of the text tower"""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """shape of the vision tower"""
    projection_size: int = 128
    """length of the vectors in which texts and images are compared"""

    def __post_init__(self) -> None:
        if self.projection_size < 1:
            raise UserError(f"projection_size={self.projection_size} must be at least 1.")

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.text.max_seq_len


class TextTower(nn.Module):
    """Tokens and learnt positions through a causal stack; the state of the caption's end is the caption's."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embed = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.layers = Tower(config)
        self.final_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def embedded(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return what the first block takes, (B, T, D). Raises UserError when there are more tokens than positions."""
        if tokens_BT.shape[1] > self.config.max_seq_len:
            raise UserError(f"a caption of {tokens_BT.shape[1]} tokens exceeds text.max_seq_len={self.config.max_seq_len}. Cut it.")
        return self.embed(tokens_BT) + self.position_embed.weight[: tokens_BT.shape[1]]

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the normalised hidden states, (B, T, D). What stands behind a caption's end changes nothing before it."""
        return self.final_norm(self.layers(self.embedded(tokens_BT), causal=True))

    def pooled(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the state at the first end token of each caption, (B, D)."""
        # The configurations that were published first name a wrong end; there the end has the highest id of all.
        is_end = tokens_BT == self.config.end_id if self.config.end_id != LEGACY_END else tokens_BT
        return self(tokens_BT)[torch.arange(len(tokens_BT), device=tokens_BT.device), is_end.to(torch.int64).argmax(1)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        self.embed.weight.normal_(0.0, 0.02, generator=generator)
        self.position_embed.weight.normal_(0.0, 0.01, generator=generator)
        self.layers.init_weights(generator)
        self.final_norm.reset_parameters()


class DualEncoder(nn.Module):
    """Two towers, each with a projection to the shared space, and the learnt temperature of their similarity.

    Source: Radford et al. 2021, arXiv:2103.00020, section 2.3 and figure 3.
    """

    def __init__(self, config: DualEncoderConfig):
        super().__init__()
        self.config = config
        self.text = TextTower(config.text)
        self.vision = VisionTransformer(config.vision)
        self.text_projection = BiasedLinear(config.text.hidden_size, config.projection_size, bias=False)
        self.vision_projection = BiasedLinear(config.vision.hidden_size, config.projection_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))

    def encode_text(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return a vector of length 1 for each caption, (B, projection_size)."""
        return F.normalize(self.text_projection(self.text.pooled(tokens_BT)).float(), dim=-1)

    def encode_image(self, pixels_NCSS: torch.Tensor) -> torch.Tensor:
        """Return a vector of length 1 for each image, (N, projection_size)."""
        return F.normalize(self.vision_projection(self.vision.pooled(pixels_NCSS)).float(), dim=-1)

    def forward(self, tokens_BT: torch.Tensor, pixels_NCSS: torch.Tensor) -> torch.Tensor:
        """Return the scaled similarity of each image with each caption, fp32 (N, B)."""
        return self.logit_scale.float().exp() * self.encode_image(pixels_NCSS) @ self.encode_text(tokens_BT).t()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> DualEncoder:
        """Draw the weights as CLIP's released code does; the temperature starts at 0.07."""
        self.text.init_weights(generator)
        self.vision.init_weights(generator)
        for projection in (self.text_projection, self.vision_projection):
            projection.weight.normal_(0.0, projection.in_features**-0.5, generator=generator)
        self.logit_scale.fill_(FIRST_LOGIT_SCALE)
        return self

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        return dict([*self.text.layers.matrix_parts("text.layers."), *self.vision.layers.matrix_parts("vision.layers.")])

    @torch.no_grad()
    def attention_weights(self, tokens_T: torch.Tensor, pixels_CSS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what each tower attends to, {"text", "vision"}: fp32 (L, H, T, S); position 0 of an image is the class token."""
        text = self.text.layers.attention_weights(self.text.embedded(tokens_T[None]), causal=True)[:, 0]
        return {"text": text, **self.vision.attention_weights(pixels_CSS)}
