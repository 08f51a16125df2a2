"""Reports on judges, worked by hand."""

import numpy as np
import pytest

from plinth.evaluation.judging import cohen_kappa, judge_report


def test_kappa_worked_by_hand():
    a = [True] * 25 + [False] * 25
    b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15  # agreement 0.7; chance 0.5·0.6 + 0.5·0.4
    score = cohen_kappa(a, b)
    assert score.value == pytest.approx((0.7 - 0.5) / 0.5) and score.n == 50
    assert score.ci95[0] < 0.4 < score.ci95[1]
    assert cohen_kappa(a, a).value == 1.0 and cohen_kappa([True] * 4, [True] * 4).value == 0.0
    with pytest.raises(ValueError, match="two labels of each thing"):
        cohen_kappa([True], [])


def test_chance_agreement_is_that_of_a_coin_whatever_the_files_order():
    rng = np.random.default_rng(0)
    orders = [(p, 1 - p) for p in rng.random(2000)]
    report = judge_report(orders, [True] * 2000, range(2000))
    assert report["position_bias"]["value"] == 0.0 and abs(report["kappa"]["value"]) < 0.05


def test_ties_count_as_halves():
    report = judge_report([(0.5, 0.5), (0.9, 0.2), (0.8, 0.8), (0.1, 0.3)], [None, True, None, False], range(4))
    assert report["position_bias"]["value"] == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert report["first_position_share"] == 0.5
    assert report["agreement"]["value"] == 1.0
