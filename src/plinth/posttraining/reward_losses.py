"""Losses of a reward model, as functions of the scores that it gives to answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, margin_B: Tensor | None = None, center_coef: float = 0.0
) -> tuple[Tensor, int, dict[str, float]]:
    """Return (Σ −log σ(c − r − margin) + λ(c + r)², pairs, metrics); c and r are the scores, λ is `center_coef`.

    Metrics are sums over pairs: accuracy, where a tie counts as wrong, and the margin c − r.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin of Touvron et al. 2023, arXiv:2307.09288, eq. 2; the centering of
    Eisenstein et al. 2023, arXiv:2312.09244.
    """
    difference_B = chosen_B - rejected_B
    loss_B = -F.logsigmoid(difference_B if margin_B is None else difference_B - margin_B)
    if center_coef:
        loss_B = loss_B + center_coef * (chosen_B + rejected_B) ** 2
    with torch.no_grad():
        metrics = {"accuracy": float((difference_B > 0).sum()), "margin": float(difference_B.sum())}
    return loss_B.sum(), loss_B.numel(), metrics


def ranking_loss(scores_PG: Tensor, ranks_PG: Tensor) -> tuple[Tensor, int, dict[str, float]]:
    """Return (Σ over prompts of the mean −log σ(better − worse), prompts, metrics) of rankings; rank 0 is the best.

    All pairs of one prompt make one element, each weighted by one over the prompt's number of pairs. Equal ranks make no pair, and a
    negative rank leaves the completion out; a prompt without pairs does not count. Metrics: the summed share of right pairs.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    if scores_PG.shape != ranks_PG.shape:
        raise ValueError(f"scores have shape {tuple(scores_PG.shape)}, ranks {tuple(ranks_PG.shape)}; they must agree.")
    present_PG = ranks_PG >= 0
    better_PGG = (ranks_PG[:, :, None] < ranks_PG[:, None, :]) & present_PG[:, :, None] & present_PG[:, None, :]
    difference_PGG = scores_PG[:, :, None] - scores_PG[:, None, :]
    pairs_P = better_PGG.sum((1, 2))
    loss_P = (-F.logsigmoid(difference_PGG) * better_PGG).sum((1, 2)) / pairs_P.clamp(min=1)
    with torch.no_grad():
        right_P = ((difference_PGG > 0) & better_PGG).sum((1, 2)) / pairs_P.clamp(min=1)
    return loss_P.sum(), int((pairs_P > 0).sum()), {"accuracy": float(right_P.sum())}
