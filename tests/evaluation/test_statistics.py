"""Scores against closed forms, brute force and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from plinth.evaluation.statistics import (
    Score,
    agreement,
    bootstrap_ratio,
    clustered_stderr,
    map_score,
    mean_score,
    paired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)  # the last is the example of Newcombe 1998, Statistics in Medicine 17, table I
def test_wilson_known_values(k, n, low, high):
    assert wilson(k, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_solves_its_equation():
    """The ends are where the normal test of the true share just rejects."""
    low, high = wilson(7, 23)
    for end in (low, high):
        assert abs(7 / 23 - end) / math.sqrt(end * (1 - end) / 23) == pytest.approx(1.959964, abs=1e-5)


def test_mean_without_clusters_is_the_textbook_one():
    values = [0.0, 1.0, 1.0, 0.25]
    score = mean_score(values)
    assert score.value == 0.5625 and score.n == 4
    assert score.stderr == pytest.approx(np.std(values, ddof=1) / 2)


def test_repeating_each_answer_adds_no_certainty():
    single = mean_score([1, 0, 0, 1, 1, 0, 1])
    repeated = mean_score([1, 0, 0, 1, 1, 0, 1] * 3, clusters=list("abcdefg") * 3)
    assert (repeated.value, repeated.n) == (single.value, single.n)
    assert repeated.stderr == pytest.approx(single.stderr)
    assert repeated.ci95 == pytest.approx(single.ci95)


def test_independent_answers_within_clusters_count_in_full():
    values, clusters = [1, 0] * 50, [i // 2 for i in range(100)]  # every cluster has one right and one wrong
    assert clustered_stderr(np.array(values, float), np.array(clusters)) == 0.0
    assert mean_score(values, clusters).ci95 == pytest.approx(wilson(25, 50))
    flipped = mean_score([1, 0, 0, 1] * 25, [i // 4 for i in range(100)])
    assert flipped.value == 0.5


def test_all_right_is_not_certain():
    score = mean_score([1.0] * 30, clusters=[i // 3 for i in range(30)])
    assert score.ci95 == pytest.approx(wilson(10, 10))
    assert score.n == 10


def test_mean_refuses_what_is_no_share():
    for values in ([], [0.5, 1.5]):
        with pytest.raises(ValueError, match="within"):
            mean_score(values)
    with pytest.raises(ValueError, match="2 clusters for 3 values"):
        mean_score([0, 1, 1], clusters=["a", "b"])


def test_interval_of_clustered_answers_covers():
    """Facts are right with a probability of their own; three phrasings each. 95 % of the intervals should hold the truth."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        chance = rng.beta(0.6, 0.4, size=60)
        values = rng.random((60, 3)) < chance[:, None]
        low, high = mean_score(values.ravel().astype(float), np.repeat(np.arange(60), 3)).ci95
        hits += low <= 0.6 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_bootstrap_ratio_against_all_resamples():
    x, y = [1.0, 4.0, 2.5, 3.0, 0.7], [2.0, 3.0, 1.0, 4.4, 1.1]
    exact = [sum(x[i] for i in rows) / sum(y[i] for i in rows) for rows in itertools.product(range(5), repeat=5)]
    score = bootstrap_ratio(x, y, seed=1, resamples=50_000)
    ratio = sum(x) / sum(y)
    assert score.value == pytest.approx(ratio)
    assert score.ci95 == (pytest.approx(np.quantile(exact, 0.025), abs=0.02), pytest.approx(np.quantile(exact, 0.975), abs=0.02))
    residuals = [a - ratio * b for a, b in zip(x, y)]
    assert score.stderr == pytest.approx(math.sqrt(5 / 4 * sum(r * r for r in residuals)) / sum(y))


def test_bootstrap_with_equal_weights_is_the_mean():
    x = np.random.default_rng(0).normal(3, 1, 500)
    score = bootstrap_ratio(x, np.ones(500))
    assert score.stderr == pytest.approx(np.std(x, ddof=1) / math.sqrt(500))
    assert np.diff(score.ci95)[0] == pytest.approx(2 * 1.96 * score.stderr, rel=0.1)


def test_bootstrap_is_the_same_for_the_same_seed():
    x, y = np.arange(1.0, 30.0), np.arange(2.0, 31.0)
    assert bootstrap_ratio(x, y, seed=5) == bootstrap_ratio(x, y, seed=5) != bootstrap_ratio(x, y, seed=6)


def test_bootstrap_interval_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        y = rng.gamma(2.0, 50.0, size=80)
        x = y * (1.3 + 0.3 * rng.normal(size=80))
        low, high = bootstrap_ratio(x, y, seed=seed, resamples=400).ci95
        hits += low <= 1.3 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_one_document_has_no_interval():
    plain = bootstrap_ratio([3.0], [2.0]).to_dict()
    assert plain["value"] == 1.5 and plain["stderr"] is None and plain["ci95"] == [None, None]
    with pytest.raises(ValueError, match="one length"):
        bootstrap_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive sum"):
        bootstrap_ratio([1.0], [0.0])


def test_paired_difference_is_smaller_than_unpaired():
    rng = np.random.default_rng(2)
    easy = rng.random(300) < 0.5
    a, b = easy | (rng.random(300) < 0.1), easy
    score = paired_difference(a, b)
    assert score.value == pytest.approx(a.mean() - b.mean())
    assert score.stderr == pytest.approx(np.std(a.astype(float) - b, ddof=1) / math.sqrt(300))
    assert score.stderr < math.hypot(mean_score(a).stderr, mean_score(b).stderr) / 2
    assert paired_difference(b, a).value == -score.value
    doubled = paired_difference(np.tile(a, 2), np.tile(b, 2), list(range(300)) * 2)
    assert doubled.stderr == pytest.approx(score.stderr)


def test_map_score_carries_the_interval():
    mapped = map_score(Score(1.0, 9, 0.1, (0.8, 1.2)), math.exp, math.e)
    assert mapped == Score(math.e, 9, 0.1 * math.e, (math.exp(0.8), math.exp(1.2)))


@pytest.mark.parametrize(("answers", "share"), [("aaa", 1.0), ("aab", 1 / 3), ("abc", 0.0), ("ab", 0.0), ("a", 1.0), ("aabb", 1 / 3)])
def test_agreement_by_counting_pairs(answers, share):
    pairs = list(itertools.combinations(answers, 2))
    assert agreement(list(answers)) == pytest.approx(share)
    if pairs:
        assert share == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
