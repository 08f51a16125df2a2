"""Prompts with images for the engine: the rows that stand for an image get token ids of their own.

The decoder's embedding is continued by the rows of all images of a call, and a prompt names them by ids behind the vocabulary. So the
engine runs prompts with images as any others: continuous batching, sampling, stop strings, shared prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from plinth.inference.runner import Rows
from plinth.inference.torch_runner import TorchRunner
from plinth.models.meta import on_meta
from plinth.models.transformer import Transformer
from plinth.models.vision_language import VisionLanguageModel


class ImageRunner:
    """A runner whose prompts may hold the ids of rows behind the vocabulary; none of them is ever generated."""

    def __init__(self, model: VisionLanguageModel, pixels_NCSS: torch.Tensor):
        """Look at the images once; their ids follow the vocabulary, image by image."""
        with torch.inference_mode():
            rows = model.image_rows(pixels_NCSS.to(model.decoder.embed.weight.dtype))
        self._num_rows, self._image_tokens, self._first = rows.shape[0] * rows.shape[1], rows.shape[1], model.config.vocab_size
        self._inner = TorchRunner(with_rows(model.decoder, rows.flatten(0, 1)))
        self.config, self.weights = self._inner.config, self._inner.weights
        self.vocab_size = self._first + self._num_rows
        self.max_seq_len, self.device, self.uniform = self._inner.max_seq_len, self._inner.device, self._inner.uniform
        self.allocate, self.block_bytes = self._inner.allocate, self._inner.block_bytes
        self.hidden, self.copy_blocks, self.reload = self._inner.hidden, self._inner.copy_blocks, self._inner.reload

    def forward(self, rows: Rows) -> torch.Tensor:
        """Return the logits of the wanted rows, float32 (M, V), those behind the vocabulary -inf."""
        return F.pad(self._inner.forward(rows), (0, self._num_rows), value=-torch.inf)

    def fill(self, tokens: Sequence[int], image_id: int, images: Sequence[int]) -> list[int]:
        """Return a prompt with the ids of the given images' rows, in order, in the places of `image_id`."""
        rows = (self._first + image * self._image_tokens + i for image in images for i in range(self._image_tokens))
        filled = [next(rows, -1) if token == image_id else token for token in tokens]
        assert -1 not in filled and next(rows, None) is None, "as many places as the images have rows"
        return filled


def with_rows(decoder: Transformer, rows_ND: torch.Tensor) -> Transformer:
    """Return a decoder with the same weights whose embedding goes on with the given rows; its head does not."""
    shell = on_meta(lambda: Transformer(replace(decoder.config, tie_embeddings=False)))
    state = decoder.state_dict() | {"head.weight": decoder.output_weight.detach()}
    shell.load_state_dict(state, assign=True)
    table = torch.cat((decoder.embed.weight.detach(), rows_ND.to(decoder.embed.weight)))
    shell.embed = nn.Embedding.from_pretrained(table)
    return shell.requires_grad_(False).eval()
