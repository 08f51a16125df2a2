"""Judges of pairs: ties, baselines that learn what they can, intervals of the difference, and calibration."""

import json
import math

import numpy as np
import pytest

from plinth.evaluation.calibration import calibrate_differences, expected_calibration_error, fit_temperature, log_loss, reliability
from plinth.evaluation.comparisons import Baselines, LengthJudge, Pair, WordJudge, accuracy, compare_judges
from plinth.evaluation.statistics import wilson


def test_ties_count_half_and_are_said():
    score = accuracy([1.0, -1.0, 0.0, 2.0])
    assert score.value == 0.625 and score.protocol == {"ties": 1} and score.ci95[0] < 0.625 < score.ci95[1]
    assert accuracy([1.0] * 30 + [-1.0] * 10).ci95 == pytest.approx(wilson(30, 40), abs=0.003)  # its error has n - 1
    clustered = accuracy([1.0] * 30 + [-1.0] * 10, [i // 5 for i in range(40)])
    assert clustered.n == 8 and clustered.ci95[1] - clustered.ci95[0] > wilson(30, 40)[1] - wilson(30, 40)[0]


def test_baselines_learn_the_length_and_the_words_and_come_back_from_json():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(20)]
    pairs = [Pair(" ".join(["kind", *rng.choice(words, 3)]), " ".join(["rude", *rng.choice(words, 3 + i % 3)]), i) for i in range(60)]
    fitted = Baselines.fit(pairs[:40])
    assert fitted.length == LengthJudge(-1)
    assert (fitted.words.differences(pairs[40:]) > 0).all()
    assert fitted.words.weights[fitted.words.places["kind"]] > 0 > fitted.words.weights[fitted.words.places["rude"]]
    again = Baselines.from_dict(json.loads(json.dumps(fitted.to_dict())))
    np.testing.assert_array_equal(again.words.differences(pairs[40:]), fitted.words.differences(pairs[40:]))
    assert WordJudge.fit(pairs[:1]).differences(pairs[:2]).tolist() == [0, 0]  # nothing seen twice: only ties


def test_the_verdict_says_better_not_told_apart_or_worse():
    pairs = [Pair("aa" if i % 2 else "a", "a" if i % 2 else "aa", i) for i in range(200)]
    baselines = Baselines.fit(pairs[:40])
    good, poor = (compare_judges(list(np.where(np.arange(200) % 10 < right, 1.0, -1.0)), pairs, baselines) for right in (9, 5))
    assert good["beats_baselines"] and "90.0%" in good["verdict"] and "better than length" in good["verdict"]
    assert not poor["beats_baselines"] and "not told apart from" in poor["verdict"] and "coin (50.0%)" in poor["verdict"]
    worse = compare_judges([-1.0] * 200, pairs, baselines)
    assert "worse than" in worse["verdict"] and worse["accuracy"]["value"] == 0
    alone = compare_judges([1.0] * 200, pairs, None)
    assert alone["beats_baselines"] is None and list(alone["baselines"]) == ["coin"]
    json.dumps(good)


def test_reliability_worked_by_hand():
    probabilities, outcomes = np.array([0.1, 0.15, 0.9, 1.0]), np.array([0, 1, 1, 1])
    bins = reliability(probabilities, outcomes, bins=2)
    assert [(each.n, each.share) for each in bins] == [(2, 0.5), (2, 1.0)]
    assert expected_calibration_error(probabilities, outcomes, bins=2) == pytest.approx(0.5 * (0.5 - 0.125) + 0.5 * 0.05)
    assert log_loss([0.0, 2.0], [1, 0]) == pytest.approx((math.log(2) + math.log(1 + math.exp(2))) / 2)
    with pytest.raises(ValueError, match="one length"):
        reliability([0.5], [1, 0])


def test_temperature_recovers_how_much_too_sure_a_judge_is():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 4000)
    outcomes = rng.random(4000) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(3 * logits, outcomes) == pytest.approx(3, rel=0.1)
    signed = 3 * np.where(outcomes, logits, -logits)
    found = calibrate_differences(signed.tolist())
    assert found["rest"]["ece_with_temperature"] < 0.5 * found["rest"]["ece"] and found["temperature"] == pytest.approx(3, rel=0.15)
    assert found["rest"]["log_loss_nats_with_temperature"] < found["rest"]["log_loss_nats"]
    assert sum(each["n"] for each in found["bins"]) == 4000
