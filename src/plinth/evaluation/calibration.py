"""Whether probabilities mean what they say: reliability bins, the expected calibration error, and the temperature that mends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from plinth.evaluation.statistics import wilson

LARGEST_TEMPERATURE = 1000.0


@dataclass(frozen=True)
class Bin:
    """Predictions whose probabilities lie close together."""

    low: float
    """smallest probability of the bin"""
    high: float
    """largest probability of the bin"""
    n: int
    """predictions in it"""
    confidence: float
    """their mean probability"""
    share: float
    """share of them that came true"""
    ci95: tuple[float, float]
    """95 % interval of the share, Wilson's"""


def reliability(
    probabilities: Sequence[float], outcomes: Sequence[float], bins: int = 10, low: float = 0.0, high: float = 1.0
) -> list[Bin]:
    """Return the bins of equal width in [low, high] that hold a prediction; an outcome is 1, 0, or 0.5 for a tie.

    Source: DeGroot and Fienberg 1983, "The comparison and evaluation of forecasters".
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if p.shape != y.shape or p.size == 0:
        raise ValueError(f"reliability needs two sequences of one length; got {p.size} and {y.size}.")
    edges = np.linspace(low, high, bins + 1)
    places = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, bins - 1)
    found = []
    for place in np.unique(places):
        mine = places == place
        n = int(mine.sum())
        share = float(y[mine].mean())
        found.append(Bin(float(edges[place]), float(edges[place + 1]), n, float(p[mine].mean()), share, wilson(share * n, n)))
    return found


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance between confidence and share, weighted by the bins' sizes.

    Source: Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning".
    """
    total = sum(each.n for each in bins)
    return sum(each.n * abs(each.confidence - each.share) for each in bins) / total


def log_loss(logits: Sequence[float], outcomes: Sequence[float]) -> float:
    """Return the mean of −y log σ(x) − (1 − y) log σ(−x) in nats."""
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    return float(np.mean(y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)))


def fit_temperature(logits: Sequence[float], outcomes: Sequence[float]) -> float:
    """Return the T > 0 with which σ(logit / T) gives the smallest log loss; at most LARGEST_TEMPERATURE, where nothing is known.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    x = np.asarray(logits, dtype=np.float64)
    bound = np.log(LARGEST_TEMPERATURE)
    found = minimize_scalar(lambda t: log_loss(x * np.exp(-t), outcomes), bounds=(-bound, bound), method="bounded")
    return float(np.exp(found.x))


def calibrate_differences(differences: Sequence[float]) -> dict[str, Any]:
    """Return how well σ(score of the better − score of the worse) says how often the higher score is the better answer.

    The temperature is fitted on every other comparison and judged on the rest. Gives plain JSON values: bins of the confidence, from
    0.5 on, ece, log_loss (log 2 is what a coin has), temperature, and ece and log_loss of the rest with it.
    """
    x = np.asarray(differences, dtype=np.float64)
    temperature = fit_temperature(x[::2], np.ones(len(x[::2])))
    rest = x[1::2] if len(x) > 1 else x
    bins, cooled = (confidence_bins(part) for part in (x, rest / temperature))
    return {
        "bins": [asdict(each) for each in bins],
        "ece": expected_calibration_error(bins),
        "log_loss_nats": log_loss(x, np.ones(len(x))),
        "temperature": temperature,
        "ece_with_temperature": expected_calibration_error(cooled),
        "log_loss_nats_with_temperature": log_loss(rest / temperature, np.ones(len(rest))),
    }


def confidence_bins(differences: np.ndarray, bins: int = 5) -> list[Bin]:
    """Return the bins of σ(|difference|) in [0.5, 1] against whether the difference has the right sign; 0 counts half."""
    outcomes = np.where(differences > 0, 1.0, np.where(differences < 0, 0.0, 0.5))
    return reliability(expit(np.abs(differences)), outcomes, bins, 0.5, 1.0)
