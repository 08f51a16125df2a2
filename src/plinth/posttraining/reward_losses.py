"""Losses of a reward model, as functions of the scores that it gives to answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    margin_B: Tensor | None = None,
    center_coef: float = 0.0,
    probability_B: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> tuple[Tensor, float, dict[str, float]]:
    """Return (Σ w (−p log σ(d) − (1 − p) log σ(−d) + λ(c + r)²), Σ w, metrics), d = c − r − margin; c and r are the scores.

    p is `probability_B`, how sure the label is (default 1), w is `weight_B` (default 1), λ is `center_coef`. Metrics are sums over pairs
    times w: accuracy, where a tie counts as wrong, and the margin c − r.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin of Touvron et al. 2023, arXiv:2307.09288, eq. 2; the centering of
    Eisenstein et al. 2023, arXiv:2312.09244; the soft labels of Lee et al. 2023, arXiv:2309.00267, section 2.1.
    """
    difference_B = chosen_B - rejected_B
    wanted_B = difference_B if margin_B is None else difference_B - margin_B
    loss_B = -F.logsigmoid(wanted_B)
    if probability_B is not None:
        loss_B = probability_B * loss_B - (1 - probability_B) * F.logsigmoid(-wanted_B)
    if center_coef:
        loss_B = loss_B + center_coef * (chosen_B + rejected_B) ** 2
    weight_B = torch.ones_like(loss_B) if weight_B is None else weight_B
    with torch.no_grad():
        metrics = {"accuracy": float(((difference_B > 0) * weight_B).sum()), "margin": float((difference_B * weight_B).sum())}
    return (loss_B * weight_B).sum(), float(weight_B.sum()), metrics


def ranked_pairs(ranks_PG: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (prompt, better, worse, weight) of all pairs of unequal rank, (M,) each; rank 0 is the best, a negative one is left out.

    Each pair weighs one over its prompt's number of pairs, so that every prompt with a pair weighs 1.
    """
    present_PG = ranks_PG >= 0
    better_PGG = (ranks_PG[:, :, None] < ranks_PG[:, None, :]) & present_PG[:, :, None] & present_PG[:, None, :]
    prompt_M, better_M, worse_M = better_PGG.nonzero(as_tuple=True)
    return prompt_M, better_M, worse_M, better_PGG.sum((1, 2))[prompt_M].double().reciprocal()


def ranking_loss(
    scores_PG: Tensor, ranks_PG: Tensor, *, margin_P: Tensor | None = None, probability_P: Tensor | None = None, center_coef: float = 0.0
) -> tuple[Tensor, int, dict[str, float]]:
    """Return (Σ over prompts of the mean −log σ(better − worse), prompts, metrics) of rankings; rank 0 is the best.

    All pairs of one prompt make one element. Equal ranks make no pair, and a negative rank leaves the completion out; a prompt without
    pairs does not count. Margins and probabilities are as in `bradley_terry_loss`, of every pair of their prompt. Metrics, summed over
    prompts: those of `bradley_terry_loss` as means over a prompt's pairs, and mean_score, of its ranked completions.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    if scores_PG.shape != ranks_PG.shape:
        raise ValueError(f"scores have shape {tuple(scores_PG.shape)}, ranks {tuple(ranks_PG.shape)}; they must agree.")
    prompt_M, better_M, worse_M, weight_M = ranked_pairs(ranks_PG)
    weight_M = weight_M.to(scores_PG.dtype)
    total, _, metrics = bradley_terry_loss(
        scores_PG[prompt_M, better_M], scores_PG[prompt_M, worse_M], margin_B=None if margin_P is None else margin_P[prompt_M],
        center_coef=center_coef, probability_B=None if probability_P is None else probability_P[prompt_M], weight_B=weight_M,
    )  # fmt: skip
    with torch.no_grad():
        present_PG = ranks_PG >= 0
        metrics["mean_score"] = float(((scores_PG * present_PG).sum(1) / present_PG.sum(1))[prompt_M] @ weight_M)
    return total, len(prompt_M.unique()), metrics
