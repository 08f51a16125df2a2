"""The loss of an encoder-decoder: cross-entropy of the target given the source and the target so far, labels smoothed if asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from plinth.ops.dropout import seeded
from plinth.ops.loss import linear_cross_entropy
from plinth.training.objectives import padded_rows, select_rows


def sequence_to_sequence_loss(model: Any, batch: tuple[torch.Tensor, ...], smoothing: float = 0.0):
    """Return the summed loss of a batch (source (B, S), its mask, inputs (B, T), targets (B, T), and seeds (B,) where dropout draws).

    Targets below 0 do not count. With smoothing e a target is 1 - e of itself and e of all tokens alike; the metric `nll_nats` is the
    loss without.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 5.4, after Szegedy et al. 2016, arXiv:1512.00567.
    """
    source_BS, mask_BS, inputs_BT, targets_BT, *seeds = batch
    hidden_ND = model(source_BS, mask_BS, inputs_BT, seeded(seeds[0]) if seeds else None).flatten(0, 1)
    targets_N, weight_VD = targets_BT.flatten(), model.output_weight
    counted_N = targets_N >= 0
    count: Any = counted_N.sum(dtype=torch.float64)
    if targets_N.device.type == "cpu":
        count = int(counted_N.sum())
        if padded_rows(count) < targets_N.numel():
            rows = select_rows(counted_N, count)
            hidden_ND, targets_N = hidden_ND[rows], targets_N[rows]
    if model.head_bias is not None:  # one more column: a hidden channel that is 1, with the bias as its weight
        hidden_ND = torch.cat((hidden_ND, hidden_ND.new_ones(len(hidden_ND), 1)), 1)
        weight_VD = torch.cat((weight_VD, model.head_bias.view(-1, 1)), 1)
    loss = linear_cross_entropy(hidden_ND, weight_VD, targets_N)
    if not smoothing:
        return loss, count, {}
    nll = loss.detach()
    return loss + smoothing * target_margin(hidden_ND, weight_VD, targets_N), count, {"nll_nats": nll if nll.is_cuda else float(nll)}


def target_margin(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return how far the targets' logits lie above the mean logit, summed over the counted ones, an fp32 scalar.

    Times e it is what smoothing by e adds to the cross-entropy: with logits z and their log-sum s, (1 - e)(s - z_y) + e(s - mean z)
    is s - z_y + e(z_y - mean z). So no logits are held for it.
    """
    counted_N = targets_N >= 0
    beyond_ND = F.embedding(targets_N.clamp_min(0), weight_VD).float() - weight_VD.float().mean(0)
    return ((hidden_ND.float() * beyond_ND).sum(-1) * counted_N).sum()
