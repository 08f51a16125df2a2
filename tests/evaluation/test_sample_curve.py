"""Estimates for fewer samples: enumeration of all subsets, closed forms, and no bias."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.evaluation.sample_curve import Sampled, best_of_at, curve, majority_at, pass_at

SAMPLES = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=7)


def majority_by_hand(answers, right_answers):
    counts = Counter(answers)
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(answer in right_answers for answer in best) / len(best)


def best_by_hand(pairs, right_answers):
    best = [answer for answer, score in pairs if score == max(score for _, score in pairs)]
    return sum(answer in right_answers for answer in best) / len(best)


@settings(max_examples=80, deadline=None)
@given(SAMPLES, st.sets(st.sampled_from("abcd")), st.integers(1, 7))
def test_estimates_are_means_over_all_subsets(samples, right_answers, k):
    k = min(k, len(samples))
    answers, scores = [answer for answer, _ in samples], [score for _, score in samples]
    right = [answer in right_answers for answer in answers]
    subsets = list(itertools.combinations(samples, k))
    assert pass_at(right, k) == pytest.approx(np.mean([any(a in right_answers for a, _ in subset) for subset in subsets]))
    assert majority_at(right, answers, k) == pytest.approx(np.mean([majority_by_hand([a for a, _ in s], right_answers) for s in subsets]))
    assert best_of_at(right, scores, k) == pytest.approx(np.mean([best_by_hand(subset, right_answers) for subset in subsets]))


def test_a_synthetic_verifier_gives_the_closed_form():
    """Samples that are right with probability p: coverage of k is 1 - (1 - p)^k, and a majority of two answers is binomial."""
    generator, p, questions = np.random.default_rng(0), 0.3, 4000
    drawn = [generator.random(12) < p for _ in range(questions)]
    for k in (1, 2, 5, 12):
        coverage = np.mean([pass_at(list(right), k) for right in drawn])
        assert abs(coverage - (1 - (1 - p) ** k)) < 4 * 0.5 / questions**0.5
    votes = np.mean([majority_at(list(right), [bool(flag) for flag in right], 3) for right in drawn])
    assert abs(votes - (p**3 + 3 * p**2 * (1 - p))) < 4 * 0.5 / questions**0.5


def test_a_score_that_knows_the_truth_is_a_perfect_verifier_and_a_blind_one_is_one_sample():
    right = [True, False, False, True, False]
    for k in range(1, 6):
        assert best_of_at(right, [float(flag) for flag in right], k) == pytest.approx(pass_at(right, k))
        assert best_of_at(right, [0.0] * 5, k) == pytest.approx(2 / 5)


def test_a_curve_has_intervals_and_its_price_grows_with_n():
    questions = [Sampled([True, False, True, True], list("abaa"), [1.0, 2.0, 3.0, 4.0], 10, [3, 4, 5, 8], 100, 400)] * 3
    first, second = curve(questions, (1, 4))
    assert first["coverage"].value == pytest.approx(0.75) and second["coverage"].value == 1.0
    assert second["majority"].value == second["best_of"].value == 1.0
    assert (first["completion_tokens"], second["completion_tokens"]) == (5.0, 20.0)
    assert (first["flops"], second["flops"]) == (200.0, 500.0)
    assert first["coverage"].ci95[0] < 0.75 < first["coverage"].ci95[1]


def test_what_cannot_be_estimated_is_an_error():
    with pytest.raises(ValueError, match="k=3 is not between 1 and the 2 samples"):
        pass_at([True, False], 3)
    with pytest.raises(ValueError, match="must be equal"):
        Sampled([True], ["a", "b"], [0.0], 1, [1])
