"""Masks over a vocabulary, one bit a token, and how they are laid over logits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from plinth.ops import kernels


def mask_bytes(vocab_size: int) -> int:
    """Return the bytes of one row's mask."""
    return -(-vocab_size // 8)


def add_mask(logits_NV: torch.Tensor, masks: np.ndarray) -> torch.Tensor:
    """Set the logits of tokens that are not allowed to minus infinity, in place where that is cheaper; return them.

    masks: uint8 (N, ceil(V / 8)), bit i % 8 of byte i // 8, counted from the lowest, says whether token i is allowed.
    Raises ValueError when the shapes do not belong together.
    """
    rows, vocab = logits_NV.shape
    if masks.shape != (rows, mask_bytes(vocab)) or masks.dtype != np.uint8:
        raise ValueError(f"masks of shape {masks.shape}, {masks.dtype}, do not fit logits {tuple(logits_NV.shape)}.")
    plain = logits_NV.device.type == "cpu" and logits_NV.dtype is torch.float32 and logits_NV.is_contiguous()
    if plain and kernels.library() is not None:
        bits = torch.from_numpy(np.ascontiguousarray(masks))
        kernels.call("add_mask", logits_NV, bits, rows, vocab, masks.shape[1])
        return logits_NV
    return add_mask_by_table(logits_NV, masks)


def add_mask_by_table(logits_NV: torch.Tensor, masks: np.ndarray) -> torch.Tensor:
    """Do what add_mask does with PyTorch alone: each byte of a mask picks eight addends, 0 or minus infinity, from a table."""
    vocab = logits_NV.shape[1]
    index = torch.from_numpy(masks.astype(np.int32)).to(logits_NV.device)
    addends_NV = torch.nn.functional.embedding(index, _table(logits_NV.device)).flatten(1)[:, :vocab]
    return logits_NV.add_(addends_NV.to(logits_NV.dtype))


@lru_cache(maxsize=4)
def _table(device: torch.device) -> torch.Tensor:
    """Return float32 (256, 8): 0 where the byte's bit is set, minus infinity elsewhere."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.where(bits.bool(), 0.0, -torch.inf).to(device)
