"""How far a judge of pairs can be trusted: whether the order decides, and how often people agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plinth.evaluation.statistics import RESAMPLES, Score, mean_score


def cohen_kappa(judged: Sequence[bool], human: Sequence[bool], seed: int = 0, resamples: int = RESAMPLES) -> Score:
    """Return the agreement of two sets of labels beyond chance, with a percentile bootstrap interval; 1 is all, 0 is chance.

    Where both give one label to everything, agreement by chance is certain and the value is 0.
    Source: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    a, b = np.asarray(judged, dtype=bool), np.asarray(human, dtype=bool)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"kappa needs two labels of each thing; got {a.size} and {b.size}.")
    drawn = np.random.default_rng(seed).integers(0, a.size, size=(resamples, a.size))
    values = _kappas(a[drawn], b[drawn])
    low, high = np.quantile(values, [0.025, 0.975])
    return Score(float(_kappas(a[None], b[None])[0]), a.size, float(values.std(ddof=1)), (float(low), float(high)))


def _kappas(a_RN: np.ndarray, b_RN: np.ndarray) -> np.ndarray:
    agreed = (a_RN == b_RN).mean(1)
    p, q = a_RN.mean(1), b_RN.mean(1)
    chance = p * q + (1 - p) * (1 - q)
    return np.where(chance < 1, (agreed - chance) / np.where(chance < 1, 1 - chance, 1.0), 0.0)


def judge_report(orders: Sequence[tuple[float, float]], human: Sequence[bool | None], rows: Sequence[int]) -> dict[str, Any]:
    """Return plain JSON values on a judge, from each pair's two probabilities of the answer that was shown first.

    `orders` are (first answer shown first, second answer shown first), `human` says whether people prefer the first, `rows` name what
    pairs come from: pairs of one row depend on one another.
    position_bias: share of pairs where the same position wins in both orders (ties are halves), and of these those where it is the first;
    swap_consistency: the share where the same answer does; position_logit: mean log odds that a position has by itself, 0 for none;
    agreement and kappa with people, of the mean of both orders, where there are labels.
    """
    given, swapped = np.asarray(orders, dtype=np.float64).T
    first_wins, later_wins = np.sign(given - 0.5), np.sign(swapped - 0.5)
    same_position = (1 + first_wins * later_wins) / 2
    decided = first_wins * later_wins > 0
    report: dict[str, Any] = {
        "pairs": len(given),
        "position_bias": mean_score(same_position.tolist(), rows).to_dict(),
        "swap_consistency": mean_score((1 - same_position).tolist(), rows).to_dict(),
        "first_position_share": float((first_wins[decided] > 0).mean()) if decided.any() else None,
        "position_logit": float((_logit(given) + _logit(swapped)).mean() / 2),
    }
    labelled = [i for i, label in enumerate(human) if label is not None]
    if labelled:
        both = (given + 1 - swapped)[labelled] / 2
        labels = np.array([bool(human[i]) for i in labelled])
        right = np.where(both == 0.5, 0.5, (both > 0.5) == labels)
        report["agreement"] = mean_score(right.tolist(), [rows[i] for i in labelled]).to_dict()
        # An answer's side is chance: half of the pairs are turned, so that chance agreement is that of a coin and not of the file's order.
        turned = np.arange(len(labels)) % 2 == 0
        report["kappa"] = cohen_kappa((both > 0.5) ^ turned, labels ^ turned).to_dict()
    return report


def _logit(probability: np.ndarray) -> np.ndarray:
    clipped = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.log(clipped) - np.log1p(-clipped)
