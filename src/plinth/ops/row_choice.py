"""Our kernels on rows of logits: the peak, a draw, the largest. Each row is read by itself, so the batch changes no bit.

Their slow twins in PyTorch are in plinth.inference.sampling and plinth.inference.truncation, which choose between the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from plinth.ops import kernels
from plinth.ops.mask import mask_bytes

OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "noise")  # columns that `draw` wants


def usable(logits_NV: torch.Tensor) -> bool:
    """Return whether the kernels take these logits: float32 in the memory of a processor that has the units."""
    plain = logits_NV.dtype is torch.float32 and logits_NV.device.type == "cpu" and logits_NV.is_contiguous()
    return plain and kernels.library() is not None


def peaks(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable token a row, int64 (N,), the lower id on a tie, and the log of the sum of exponentials, float32 (N,)."""
    rows, vocab_size = logits_NV.shape
    best_N, log_sums_N = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    kernels.call("peak_rows", logits_NV, rows, vocab_size, best_N, log_sums_N, torch.get_num_threads())
    return best_N, log_sums_N


def draw(
    logits_NV: torch.Tensor, rows: Sequence[int], options_MO: np.ndarray, masks: Sequence[np.ndarray | None] | None = None
) -> torch.Tensor:
    """Return a token for each of `rows`, int64 (M,), -1 where nothing is allowed; options_MO is float64 (M, 6), columns as in OPTIONS.

    No limit is written as top_k >= V, top_p = 1, min_p = 0, typical_p = 1; temperature 0 takes the most probable token.
    masks: for each the allowed tokens, uint8 (ceil(V / 8),), bit i % 8 of byte i // 8 for token i; None = all.
    """
    count, vocab_size = len(rows), logits_NV.shape[1]
    assert options_MO.shape == (count, len(OPTIONS)) and options_MO.dtype == np.float64
    tokens_M = torch.empty(count, dtype=torch.int64)
    rows_M, options, addresses = torch.tensor(rows, dtype=torch.int64), torch.from_numpy(options_MO), None
    if masks is not None and any(mask is not None for mask in masks):
        held = [None if mask is None else np.ascontiguousarray(mask, dtype=np.uint8) for mask in masks]
        assert all(mask is None or mask.shape == (mask_bytes(vocab_size),) for mask in held)
        addresses = torch.tensor([0 if mask is None else mask.ctypes.data for mask in held])
    kernels.call("choose_rows", logits_NV, rows_M, addresses, count, vocab_size, options, tokens_M, torch.get_num_threads())
    return tokens_M


def largest(logits_NV: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ids of the `count` largest a row, int64 (N, count), largest first, the lower id first among equals; -1 behind the last."""
    rows, vocab_size = logits_NV.shape
    ids_NC = torch.empty(rows, count, dtype=torch.int64)
    kernels.call("top_rows", logits_NV, rows, vocab_size, count, ids_NC, torch.get_num_threads())
    return ids_NC
