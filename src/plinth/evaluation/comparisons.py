"""Judges of pairs of answers, held against judges that read next to nothing: the length, and the words without their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from plinth.evaluation.calibration import calibrate_differences
from plinth.evaluation.statistics import Score, mean_score, paired_difference

PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
MOST_FEATURES = 50_000
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    better: str
    """the one that was preferred"""
    worse: str
    """the other"""
    prompt: Hashable
    """names the prompt: pairs of one prompt depend on one another"""


def right(differences: Sequence[float]) -> np.ndarray:
    """Return of each comparison 1 where the better answer has the higher score, 0 where it has not, 0.5 for a tie."""
    return (np.sign(np.asarray(differences, dtype=np.float64)) + 1) / 2


def accuracy(differences: Sequence[float], prompts: Sequence[Hashable] | None = None) -> Score:
    """Return the share of right comparisons, ties as half; pairs of one prompt are taken to depend on one another."""
    return mean_score(right(differences).tolist(), prompts, {"ties": int((np.asarray(differences) == 0).sum())})


@dataclass(frozen=True)
class LengthJudge:
    """Prefers the longer answer, or the shorter."""

    sign: int
    """1: the longer; -1: the shorter"""

    @classmethod
    def fit(cls, pairs: Sequence[Pair]) -> LengthJudge:
        """Take what is right more often in the pairs."""
        return cls(1 if sum(np.sign(len(pair.better) - len(pair.worse)) for pair in pairs) >= 0 else -1)

    def differences(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return by how many characters the better answer is longer, or shorter."""
        return np.array([self.sign * (len(pair.better) - len(pair.worse)) for pair in pairs], dtype=np.float64)


@dataclass(frozen=True)
class WordJudge:
    """Logistic regression on which words and pairs of neighbouring words the answers have; their order counts no further."""

    places: dict[str, int]
    """word, or two with a blank between → place among the weights"""
    weights: np.ndarray
    """one a place"""
    penalty: float
    """factor of half the squared weights, chosen on the last fifth of the training pairs"""

    @classmethod
    def fit(cls, pairs: Sequence[Pair], penalties: Sequence[float] = PENALTIES) -> WordJudge:
        """Fit on training pairs; a feature counts when two pairs have it on one side alone, the most frequent MOST_FEATURES of them."""
        seen = Counter(name for pair in pairs for name in sorted(features(pair.better) ^ features(pair.worse)))
        places = {name: i for i, (name, count) in enumerate(seen.most_common(MOST_FEATURES)) if count > 1}
        matrix = _matrix(pairs, places)
        inner = max(1, len(pairs) * 4 // 5)
        found = {penalty: _regress(matrix[:inner], penalty) for penalty in penalties}
        scores = (
            {penalty: float(right(matrix[inner:] @ weights).mean()) for penalty, weights in found.items()} if inner < len(pairs) else {}
        )
        best = max(penalties, key=lambda penalty: (scores.get(penalty, 0.0), penalty))
        return cls(places, _regress(matrix, best), best)

    def differences(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the log odds that the better answer is the better one."""
        return _matrix(pairs, self.places) @ self.weights


def features(text: str) -> set[str]:
    """Return the words and punctuation of a text, lower case, and every two neighbours."""
    words = WORD.findall(text.lower())
    return {*words, *(f"{a} {b}" for a, b in zip(words, words[1:]))}


def _matrix(pairs: Sequence[Pair], places: dict[str, int]) -> csr_matrix:
    rows, columns, values = [], [], []
    for i, pair in enumerate(pairs):
        better, worse = features(pair.better), features(pair.worse)
        for names, value in ((better - worse, 1.0), (worse - better, -1.0)):
            known = [places[name] for name in names if name in places]
            rows += [i] * len(known)
            columns += known
            values += [value] * len(known)
    return csr_matrix((values, (rows, columns)), shape=(len(pairs), max(1, len(places))))


def _regress(matrix: csr_matrix, penalty: float) -> np.ndarray:
    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = matrix @ weights
        pull = -1 / (1 + np.exp(np.clip(margins, -500, 500)))
        return float(np.logaddexp(0, -margins).sum() + penalty / 2 * weights @ weights), matrix.T @ pull + penalty * weights

    return minimize(loss, np.zeros(matrix.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


@dataclass(frozen=True)
class Baselines:
    """The judges that any other must beat."""

    length: LengthJudge
    """reads the length"""
    words: WordJudge
    """reads the words"""

    @classmethod
    def fit(cls, pairs: Sequence[Pair]) -> Baselines:
        """Fit both on training pairs."""
        return cls(LengthJudge.fit(pairs), WordJudge.fit(pairs))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        weights = {name: float(self.words.weights[place]) for name, place in self.words.places.items()}
        return {"length_sign": self.length.sign, "words": weights, "penalty": self.words.penalty}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Baselines:
        """Return what `to_dict` was called on."""
        places = {name: i for i, name in enumerate(values["words"])}
        weights = np.array([*values["words"].values()] or [0.0])
        return cls(LengthJudge(values["length_sign"]), WordJudge(places, weights, values["penalty"]))


def compare_judges(differences: Sequence[float], held_out: Sequence[Pair], baselines: Baselines | None) -> dict[str, Any]:
    """Return a judge's accuracy on held-out pairs beside that of a coin and of the baselines, and its calibration.

    `differences` are the judge's scores of the better answers minus those of the worse. Plain JSON values: accuracy, ties, baselines
    {name: {accuracy, ahead}} with the paired difference to each, calibration, beats_baselines and a sentence that says so.
    """
    prompts = [pair.prompt for pair in held_out]
    judged = accuracy(differences, prompts)
    others = {"coin": np.zeros(len(held_out))}
    if baselines is not None:
        others = {"length": baselines.length.differences(held_out), "words": baselines.words.differences(held_out)} | others
    ahead = {name: paired_difference(right(differences), right(other), prompts) for name, other in others.items()}
    return {
        "pairs": len(held_out),
        "prompts": judged.n,
        "accuracy": judged.to_dict(),
        "ties": judged.protocol["ties"],
        "baselines": {
            name: {"accuracy": accuracy(other, prompts).to_dict(), "ahead": ahead[name].to_dict()} for name, other in others.items()
        },
        "beats_baselines": all(score.ci95[0] > 0 for score in ahead.values()) if baselines is not None else None,
        "verdict": verdict(judged, {name: accuracy(other).value for name, other in others.items()}, ahead),
        "calibration": calibrate_differences(differences),
    }


def verdict(judged: Score, others: dict[str, float], ahead: dict[str, Score]) -> str:
    """Return a sentence: whether the judge is better than each baseline, by paired 95 % intervals."""
    low, high = judged.ci95
    start = f"Right in {judged.value:.1%} of the pairs of {judged.n} held-out prompts ({low:.1%} to {high:.1%}): "
    shown = {name: f"{name} ({others[name]:.1%})" for name in others}
    worse = [shown[name] for name, score in ahead.items() if score.ci95[1] < 0]
    equal = [shown[name] for name, score in ahead.items() if score.ci95[0] <= 0 <= score.ci95[1]]
    better = [shown[name] for name, score in ahead.items() if score.ci95[0] > 0]
    parts = [f"{what} {' and '.join(names)}" for what, names in
             (("better than", better), ("not told apart from", equal), ("worse than", worse)) if names]  # fmt: skip
    return f"{start}{', '.join(parts)}."
