"""How sure a distribution of the next token is of itself: the probability that two draws from it agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plinth.ops.softcap import softcap

CHUNK_ELEMENTS = 1 << 21  # logits in flight


@torch.no_grad()
def log_sum_squares(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """Return log Σ_v p(v)² of p = softmax(hidden · weightᵀ), shape (N,), fp32 at least, without gradient.

    With a cap the logits are bounded by `ops.softcap` first. Only some rows' logits stand in memory at a time.
    """
    found = []
    for hidden in hidden_ND.split(max(1, CHUNK_ELEMENTS // len(weight_VD))):
        logits_NV = F.linear(hidden, weight_VD)
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        logits_NV = logits_NV if cap is None else softcap(logits_NV, cap)
        total_N = logits_NV.logsumexp(-1)
        found.append(logits_NV.mul_(2).logsumexp(-1) - 2 * total_N)
    return torch.cat(found)
