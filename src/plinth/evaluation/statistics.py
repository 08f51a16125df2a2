"""Scores with their uncertainty: value, n, standard error, 95 % interval, and the protocol they were obtained under."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A measured number; never shown without its interval."""

    value: float
    """the estimate"""
    n: int
    """how many independent units it rests on"""
    stderr: float
    """standard error of the estimate"""
    ci95: tuple[float, float]
    """95 % confidence interval"""
    protocol: dict[str, Any] = field(default_factory=dict)
    """what is needed to obtain the number again"""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite, such as the error of a single document, becomes None."""
        low, high = (_finite(end) for end in self.ci95)
        return {
            "value": _finite(self.value),
            "n": self.n,
            "stderr": _finite(self.stderr),
            "ci95": [low, high],
            "protocol": self.protocol,
        }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def wilson(k: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a share of k out of n; [0, 1] when n is 0.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n <= 0:
        return 0.0, 1.0
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, float(centre - half))), min(1.0, max(share, float(centre + half)))  # it holds the share, rounded or not


def cluster_ids(clusters: Sequence[Hashable] | None, n: int) -> np.ndarray:
    """Return the cluster of each of n values as integers from 0; without clusters each value is its own."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} values.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def clustered_stderr(values: np.ndarray, groups: np.ndarray) -> float:
    """Return the standard error of a mean whose values depend on one another within groups; infinity for a single group.

    With one value a group it is the usual s / sqrt(n).
    Source: Miller 2024, arXiv:2411.00640, section 2.2; ours carries the factor G / (G - 1), with G groups.
    """
    residuals = np.bincount(groups, weights=values - values.mean())
    count = len(residuals)
    if count < 2:
        return float("inf")
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / len(values))


def mean_score(values: Sequence[float], clusters: Sequence[Hashable] | None = None, protocol: dict[str, Any] | None = None) -> Score:
    """Return the mean of values in [0, 1], with values of one cluster taken to depend on one another.

    The interval is Wilson's at the effective number of values, that is p(1-p) / stderr² where the values are shares, but never more
    than their number; it does not shrink to a point where all values agree, and it stays within [0, 1].
    `n` is the number of clusters. Raises ValueError for no values or ones outside [0, 1].
    Source: Franco et al. 2019, "Comparative study of confidence intervals for proportions in complex sample surveys".
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or array.min() < 0 or array.max() > 1:
        raise ValueError(f"mean_score needs values within [0, 1]; got {array.size} values.")
    groups = cluster_ids(clusters, array.size)
    count = int(groups.max()) + 1
    mean = float(array.mean())
    stderr = clustered_stderr(array, groups)
    variance = mean * (1 - mean)
    effective = min(variance / stderr**2, array.size) if 0 < stderr < np.inf and variance > 0 else count
    return Score(mean, count, stderr if np.isfinite(stderr) else 0.5, wilson(mean * effective, effective), protocol or {})


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    seed: int = 0,
    resamples: int = RESAMPLES,
    protocol: dict[str, Any] | None = None,
) -> Score:
    """Return sum(numerators) / sum(denominators) with a percentile bootstrap interval over the units (documents).

    The standard error is the linearised one of a ratio, sqrt(n/(n-1) Σ(x - R y)²) / Σy.
    Raises ValueError for sequences of unequal length, none at all, or denominators that sum to nothing.
    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13; Cochran 1977, "Sampling techniques", chapter 6.
    """
    x, y = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if x.shape != y.shape or x.size == 0 or y.sum() <= 0:
        raise ValueError(f"bootstrap_ratio needs two sequences of one length and a positive sum; got {x.size} and {y.size} values.")
    n, ratio = x.size, float(x.sum() / y.sum())
    if n == 1:
        return Score(ratio, 1, float("inf"), (float("-inf"), float("inf")), protocol or {})
    stderr = float(np.sqrt(n / (n - 1) * np.square(x - ratio * y).sum()) / y.sum())
    ratios = np.concatenate([_resampled_ratios(x, y, rows, seed, block) for block, rows in enumerate(_blocks(resamples, n))])
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Score(ratio, n, stderr, (float(low), float(high)), protocol or {})


def _blocks(resamples: int, n: int) -> list[int]:
    """Cut the resamples in blocks whose drawn indices stay below some 32 MB."""
    rows = max(1, 4_000_000 // n)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def _resampled_ratios(x: np.ndarray, y: np.ndarray, rows: int, seed: int, block: int) -> np.ndarray:
    drawn = np.random.default_rng([seed, block]).integers(0, x.size, size=(rows, x.size))
    totals = y[drawn].sum(axis=1)
    return x[drawn].sum(axis=1)[totals > 0] / totals[totals > 0]


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    protocol: dict[str, Any] | None = None,
) -> Score:
    """Return mean(a - b) over the same questions, with a normal interval from the clustered standard error of the differences.

    Raises ValueError when the two differ in length or are empty.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"paired_difference needs two sequences of one length; got {first.size} and {second.size}.")
    difference = first - second
    groups = cluster_ids(clusters, difference.size)
    stderr = clustered_stderr(difference, groups)
    mean = float(difference.mean())
    return Score(mean, int(groups.max()) + 1, stderr, (mean - Z95 * stderr, mean + Z95 * stderr), protocol or {})


def map_score(score: Score, function: Any, slope: float) -> Score:
    """Return an increasing function of a score: its interval maps through, its standard error by the slope at the value."""
    low, high = score.ci95
    return Score(
        float(function(score.value)), score.n, score.stderr * abs(slope), (float(function(low)), float(function(high))), score.protocol
    )


def agreement(answers: Sequence[str]) -> float:
    """Return the share of pairs of answers that are the same text; 1 for fewer than two."""
    n = len(answers)
    if n < 2:
        return 1.0
    counts = {answer: answers.count(answer) for answer in set(answers)}
    return sum(count * (count - 1) for count in counts.values()) / (n * (n - 1))
