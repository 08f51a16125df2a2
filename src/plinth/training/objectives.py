"""Losses in front of the training step: each returns a sum, a count, and sums of further metrics."""

from __future__ import annotations

import torch
from torch import nn

from plinth.ops.loss import linear_cross_entropy


def causal_lm_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
    """Return the next-token cross-entropy; the batch is (inputs (B, T), targets (B, T)), targets of -1 do not count.

    The output head runs on counted positions only.
    """
    inputs_BT, targets_BT = batch
    hidden_ND = model(inputs_BT).flatten(0, 1)
    targets_N = targets_BT.flatten()
    counted_N = targets_N >= 0
    count = int(counted_N.sum())
    if count < targets_N.numel():
        rows = counted_N.nonzero()[:, 0]
        hidden_ND, targets_N = hidden_ND[rows], targets_N[rows]
    return linear_cross_entropy(hidden_ND, model.output_weight, targets_N), count, {}
