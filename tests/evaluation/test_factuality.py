"""Answering what is known and declining the rest: scores by hand, the area under the curve by counting pairs."""

import itertools

import numpy as np
import pytest

from plinth.evaluation.factuality import auroc, confidence_scores, expected_calibration_error, factuality_scores


def sample(group: str, number: int, *, right: bool = False, refused: bool = False, confidence: float | None = None) -> dict:
    return {"group": group, "fact_id": f"{group}{number}", "correct": right, "refusal": refused, "confidence": confidence}


SAMPLES = [
    sample("known", 0, right=True, confidence=0.9),
    sample("known", 1, right=True, confidence=0.6),
    sample("known", 2, confidence=0.7),
    sample("known", 3, refused=True, confidence=0.2),
    sample("heldout", 0, right=True, confidence=0.8),  # not taught, and right: neither a miss nor a hit of refusing
    sample("heldout", 1, refused=True, confidence=0.9),
    sample("invented", 0, right=True, refused=True, confidence=0.9),
    sample("invented", 1, confidence=0.3),
]


def test_scores_by_hand():
    values = {name: score.value for name, score in factuality_scores(SAMPLES, {"note": 1}).items()}
    assert values == pytest.approx(
        {
            "accuracy_answered": 3 / 5,
            "coverage": 5 / 8,
            "refusal_precision": 2 / 3,
            "refusal_recall": 2 / 3,
            "auroc": 5 / 6,  # of 3 x 2 pairs only 0.6 < 0.7 is the wrong way round
            "ece": (0.1 + 0.4 + 0.7 + 0.2 + 0.3) / 5,
        }
    )
    for score in factuality_scores(SAMPLES).values():
        assert score.ci95[0] <= score.value <= score.ci95[1] and score.stderr > 0


def test_what_cannot_be_said_is_left_out():
    assert set(factuality_scores([sample("known", 0, refused=True)])) == {"coverage", "refusal_precision"}
    assert set(factuality_scores([sample("known", 0, right=True, confidence=0.5)])) == {"accuracy_answered", "coverage", "ece"}


def test_the_area_under_the_curve_counts_pairs():
    rng = np.random.default_rng(0)
    confidence, right = rng.integers(0, 6, 60) / 6, rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(confidence[right], confidence[~right])]
    assert auroc(confidence, right) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert np.isnan(auroc(confidence, np.ones(60)))


def test_the_calibration_error_of_a_calibrated_model_is_small_and_of_a_boaster_is_its_boast():
    confidence = np.repeat([0.05, 0.55, 0.95], 100)
    right = np.concatenate([np.arange(100) < count for count in (5, 55, 95)])
    assert expected_calibration_error(confidence, right) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error(np.ones(100), np.arange(100) < 40) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="confidences within"):
        expected_calibration_error(np.array([1.5]), np.array([1.0]))


def test_answers_about_one_fact_are_drawn_together():
    confidence, right = [0.9, 0.8, 0.1, 0.2] * 10, [1.0, 1.0, 0.0, 1.0] * 10
    alone = confidence_scores(confidence, right)["ece"]
    together = confidence_scores(confidence, right, [i // 8 for i in range(40)])["ece"]
    assert (alone.n, together.n) == (40, 5) and alone.value == together.value
