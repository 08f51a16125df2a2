"""Whether a model knows what it knows: right when it answers, silent when it should be, and as sure as it is right.

A refusal is right where the model was not taught the answer and wrong where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from plinth.evaluation.calibration import expected_calibration_error
from plinth.evaluation.statistics import RESAMPLES, Score, cluster_ids, mean_score


def factuality_scores(samples: Sequence[dict[str, Any]], protocol: dict[str, Any] | None = None, seed: int = 0) -> dict[str, Score]:
    """Return the scores of judged answers (questions.judge) that the questions allow, each with its interval over whole facts.

    - accuracy_answered: of the questions that were answered, the share answered right; an answer about an invented name is wrong.
    - coverage: share of all questions that were answered.
    - refusal_precision: of the refusals, the share on questions that the model was not taught (groups other than `known`).
    - refusal_recall: of the questions that it was not taught and did not get right all the same, the share refused.
    - auroc, ece: how well the probability of an answer, where the samples carry it as `confidence`, tells right answers from wrong ones,
      and how far it is from the share right; over the questions that were answered.
    """
    protocol = protocol or {}
    answered = [sample for sample in samples if not sample["refusal"]]
    refused = [sample for sample in samples if sample["refusal"]]
    untaught = [sample for sample in samples if sample["group"] != "known" and (sample["refusal"] or not sample["correct"])]
    scores: dict[str, Score] = {}
    for name, chosen, value in (
        ("accuracy_answered", answered, lambda sample: sample["correct"]),
        ("coverage", samples, lambda sample: not sample["refusal"]),
        ("refusal_precision", refused, lambda sample: sample["group"] != "known"),
        ("refusal_recall", untaught, lambda sample: sample["refusal"]),
    ):
        if chosen:
            scores[name] = mean_score([float(value(sample)) for sample in chosen], [sample["fact_id"] for sample in chosen], protocol)
    sure = [sample for sample in answered if sample.get("confidence") is not None]
    if sure:
        confidence, right = ([float(sample[name]) for sample in sure] for name in ("confidence", "correct"))
        scores |= confidence_scores(confidence, right, [sample["fact_id"] for sample in sure], protocol, seed)
    return scores


def confidence_scores(
    confidence: Sequence[float],
    right: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    protocol: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """Return auroc (where some are right and some wrong) and ece of confidences in [0, 1], with percentile bootstrap intervals.

    Whole clusters are drawn. The calibration error of a sample lies above that of all questions: of two models compare those of equal n.
    """
    values, labels = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    groups = cluster_ids(clusters, len(values))
    scores = {"ece": _bootstrap(expected_calibration_error, values, labels, groups, seed)}
    if 0 < labels.sum() < len(labels):
        scores["auroc"] = _bootstrap(auroc, values, labels, groups, seed)
    return {name: replace(score, protocol=protocol or {}) for name, score in scores.items()}


def auroc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the chance that a right answer has more confidence than a wrong one, ties counted half; NaN where one kind is missing.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve": the Wilcoxon statistic.
    """
    values, labels = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    hits, misses = int(labels.sum()), int((~labels).sum())
    if not hits or not misses:
        return float("nan")
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # the mean rank of equal values
    return float((ranks[labels].sum() - hits * (hits + 1) / 2) / (hits * misses))


def _bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float], values: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> Score:
    """Return a statistic of two columns with the percentile interval over resampled clusters; resamples without a value are left out."""
    value, count = statistic(values, labels), int(groups.max()) + 1
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    rng = np.random.default_rng([seed, len(values)])
    found = []
    for _ in range(RESAMPLES if count > 1 else 0):
        rows = np.concatenate([members[i] for i in rng.integers(0, count, count)])
        found.append(statistic(values[rows], labels[rows]))
    found = [one for one in found if not np.isnan(one)]
    if not found:
        return Score(value, count, float("inf"), (float("-inf"), float("inf")))
    low, high = np.quantile(found, [0.025, 0.975])
    return Score(value, count, float(np.std(found)), (float(low), float(high)))
