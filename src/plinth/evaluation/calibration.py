"""Whether probabilities mean what they say: reliability bins, the expected calibration error, and the temperature that mends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from plinth.evaluation.statistics import wilson

BINS = 10  # of equal width
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
    probabilities: Sequence[float], outcomes: Sequence[float], bins: int = BINS, low: float = 0.0, high: float = 1.0
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


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Return the mean distance between confidence and share right over bins of equal width, weighted by their counts.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    values, labels = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if len(values) == 0 or values.min() < 0 or values.max() > 1:
        raise ValueError(f"a calibration error needs confidences within [0, 1]; got {len(values)}.")
    places = np.minimum((values * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(places, weights=values - labels, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


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
    0.5 on, ece, log_loss_nats (log 2 is what a coin has), temperature, and ece and log_loss_nats of the rest without it and with it.
    """
    x = np.asarray(differences, dtype=np.float64)
    temperature = fit_temperature(x[::2], np.ones(len(x[::2])))
    rest = x[1::2] if len(x) > 1 else x
    confidence, right = confidences(x)
    return {
        "bins": [asdict(each) for each in reliability(confidence, right, BINS // 2, 0.5, 1.0)],
        "ece": expected_calibration_error(confidence, right),
        "log_loss_nats": log_loss(x, np.ones(len(x))),
        "temperature": temperature,
        "rest": {
            "ece": expected_calibration_error(*confidences(rest)),
            "log_loss_nats": log_loss(rest, np.ones(len(rest))),
            "ece_with_temperature": expected_calibration_error(*confidences(rest / temperature)),
            "log_loss_nats_with_temperature": log_loss(rest / temperature, np.ones(len(rest))),
        },
    }


def confidences(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return σ(|difference|), within [0.5, 1], and whether the difference has the right sign; 0 counts half."""
    return expit(np.abs(differences)), (np.sign(differences) + 1) / 2
