"""What more completions a question would give: quality against n from one set of samples, without bias, and its price.

From N samples of a question every smaller number n is estimated as the mean over all subsets of n samples, in closed form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from plinth.evaluation.statistics import Score, mean_score


@dataclass(frozen=True)
class Sampled:
    """The samples of one question."""

    right: list[bool]
    """what the verifier says of each"""
    answers: list[Hashable]
    """what each answers, to be counted; equal answers are equally right"""
    scores: list[float]
    """what best-of-n would go by"""
    prompt_tokens: int
    """length of the question"""
    completion_tokens: list[int]
    """length of each sample"""
    prompt_flops: int = 0
    """operations that reading the question takes"""
    completion_flops: int = 0
    """operations that all samples took"""

    def __post_init__(self) -> None:
        lengths = {len(self.right), len(self.answers), len(self.scores), len(self.completion_tokens)}
        if len(lengths) != 1 or not self.right:
            raise ValueError(f"a question's lists have lengths {sorted(lengths)}; they must be equal and not empty.")


def pass_at(right: Sequence[bool], k: int) -> float:
    """Return the probability that at least one of k samples is right.

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    n, wrong = _checked(right, k), len(right) - sum(right)
    return 1.0 - math.comb(wrong, k) / math.comb(n, k)


def best_of_at(right: Sequence[bool], scores: Sequence[float], k: int) -> float:
    """Return the probability that the sample of the highest score among k is right; equal scores are equally likely to be taken."""
    n = _checked(right, k)
    subsets, value, below = math.comb(n, k), 0.0, 0
    for score in sorted(set(scores)):
        tied = [flag for flag, other in zip(right, scores) if other == score]
        chosen = math.comb(below + len(tied), k) - math.comb(below, k)  # subsets whose highest score this is
        value += chosen / subsets * sum(tied) / len(tied)
        below += len(tied)
    return value


def majority_at(right: Sequence[bool], answers: Sequence[Hashable], k: int) -> float:
    """Return the probability that the most frequent answer among k samples is right; among equals one is drawn.

    For each right answer and each number of votes for it, the subsets in which no other has more are counted by the number of others
    that have as many.
    """
    n = _checked(right, k)
    counts = Counter(answers)
    is_right = dict(zip(answers, right))
    total = 0.0
    for answer, count in counts.items():
        if is_right[answer]:
            others = [number for other, number in counts.items() if other != answer]
            total += sum(math.comb(count, votes) * _wins(others, votes, k - votes) for votes in range(1, min(count, k) + 1))
    return total / math.comb(n, k)


def _wins(others: list[int], votes: int, rest: int) -> float:
    """Sum, over the ways to choose `rest` samples from the others with no answer above `votes`, of 1 / (1 + answers that equal it)."""
    ways: dict[tuple[int, int], int] = {(0, 0): 1}  # (samples chosen, answers with as many votes) -> number of ways
    for count in others:
        longer: dict[tuple[int, int], int] = Counter()
        for (chosen, ties), number in ways.items():
            for taken in range(min(count, votes, rest - chosen) + 1):
                longer[chosen + taken, ties + (taken == votes)] += number * math.comb(count, taken)
        ways = longer
    return sum(number / (1 + ties) for (chosen, ties), number in ways.items() if chosen == rest)


def _checked(right: Sequence[bool], k: int) -> int:
    if not 1 <= k <= len(right):
        raise ValueError(f"k={k} is not between 1 and the {len(right)} samples of the question.")
    return len(right)


def curve(questions: Sequence[Sampled], sizes: Sequence[int], clusters: Sequence[Hashable] | None = None) -> list[dict[str, Any]]:
    """Return for each n the share of questions that are right by each way of choosing, with intervals, and the mean cost a question.

    Keys: n, coverage (a perfect verifier), majority, best_of (highest score), prompt_tokens, completion_tokens, flops.
    """
    rows = []
    for n in sizes:
        protocol = {"n": n, "samples": min(len(question.right) for question in questions)}

        def score(values: list[float], protocol: dict[str, Any] = protocol) -> Score:
            return mean_score(values, clusters, protocol)

        share = [n / len(question.right) for question in questions]
        rows.append(
            {
                "n": n,
                "coverage": score([pass_at(question.right, n) for question in questions]),
                "majority": score([min(1.0, majority_at(question.right, question.answers, n)) for question in questions]),
                "best_of": score([min(1.0, best_of_at(question.right, question.scores, n)) for question in questions]),
                "prompt_tokens": sum(question.prompt_tokens for question in questions) / len(questions),
                "completion_tokens": sum(part * sum(q.completion_tokens) for part, q in zip(share, questions)) / len(questions),
                "flops": sum(q.prompt_flops + part * q.completion_flops for part, q in zip(share, questions)) / len(questions),
            }
        )
    return rows
