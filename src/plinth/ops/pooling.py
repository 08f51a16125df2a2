"""One vector for a text from the states of its positions: the last, the largest of each channel, the mean; padding has no say."""

from __future__ import annotations

import torch

POOLS = {"last": ("last",), "max": ("max",), "mean": ("mean",), "concat": ("last", "max", "mean")}


def pool(hidden_BTD: torch.Tensor, lengths_B: torch.Tensor, kind: str = "concat") -> torch.Tensor:
    """Return (B, D), or with concat (B, 3 D): the state at each row's last token, the maxima and the mean over its tokens, side by side.

    `lengths_B`, int64 and at least 1 each, says how many positions of a row are text; what stands behind is never looked at.
    Source: Howard and Ruder 2018, arXiv:1801.06146, equation 4.
    """
    inside_BT1 = (torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) < lengths_B[:, None])[..., None]
    found = {
        "last": lambda: hidden_BTD.gather(1, (lengths_B - 1)[:, None, None].expand(-1, 1, hidden_BTD.shape[2]))[:, 0],
        "max": lambda: hidden_BTD.masked_fill(~inside_BT1, -torch.inf).amax(1),
        "mean": lambda: (hidden_BTD.float().masked_fill(~inside_BT1, 0.0).sum(1) / lengths_B[:, None]).to(hidden_BTD.dtype),
    }
    return torch.cat([found[part]() for part in POOLS[kind]], dim=-1)
