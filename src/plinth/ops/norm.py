"""Root-mean-square normalisation."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale the last dimension to unit root mean square, times `weight`; computed in fp32, returned in x's dtype.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.  Differs: eps inside the root, as in Llama and Qwen3.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
