"""The fit recovers the constants that made its points."""

import numpy as np
import pytest

from plinth.config import UserError
from plinth.scaling.fit import LawPoint, fit_chinchilla
from plinth.scaling.laws import BESIROGLU, HOFFMANN


def planted(law, noise=0.0, seed=0):
    """Seven sizes at five budgets around the optimum, with relative noise."""
    generator = np.random.default_rng(seed)
    points = []
    for flops in np.geomspace(1e18, 1e21, 5):
        best = law.compute_optimal(flops)[0]
        for factor in np.geomspace(0.25, 4.0, 7):
            params = best * factor
            tokens = flops / 6 / params
            points.append(LawPoint(params, tokens, law.loss(params, tokens) * float(np.exp(noise * generator.standard_normal()))))
    return points


@pytest.mark.parametrize("law", [BESIROGLU, HOFFMANN])
def test_recovers_planted_constants(law):
    fitted = fit_chinchilla(planted(law)).law
    assert fitted.irreducible == pytest.approx(law.irreducible, rel=0.01)
    assert fitted.param_exponent == pytest.approx(law.param_exponent, rel=0.01)
    assert fitted.token_exponent == pytest.approx(law.token_exponent, rel=0.01)
    assert fitted.compute_optimal(1e22) == pytest.approx(law.compute_optimal(1e22), rel=0.02)


def test_recovers_the_exponent_under_noise():
    fitted = fit_chinchilla(planted(BESIROGLU, noise=0.002, seed=1)).law
    share = fitted.token_exponent / (fitted.param_exponent + fitted.token_exponent)
    assert share == pytest.approx(0.5126, abs=0.03)


def test_an_outlier_moves_little():
    points = planted(BESIROGLU)
    points[3] = LawPoint(points[3].params, points[3].tokens, points[3].loss_nats * 1.5)
    fitted = fit_chinchilla(points).law
    assert fitted.compute_optimal(1e20)[0] == pytest.approx(BESIROGLU.compute_optimal(1e20)[0], rel=0.05)


def test_fixed_exponents_stay_and_need_fewer_runs():
    points = planted(BESIROGLU)[::9]
    result = fit_chinchilla(points, param_exponent=0.3478, token_exponent=0.3658, bytes_per_token=1.0, name="mine")
    assert (result.law.param_exponent, result.law.token_exponent) == (0.3478, 0.3658)
    assert result.law.param_coefficient == pytest.approx(482.01, rel=1e-3)
    assert result.num_points == len(points) and result.relative_rmse < 1e-4
    assert result.law.name == "mine" and result.law.max_params == max(p.params for p in points)


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (planted(BESIROGLU)[:4], "points=4 runs cannot determine 5 constants"),
        ([LawPoint(1e6, 1e7 * i, 3.0) for i in range(1, 7)], "params is the same in all runs"),
        ([*planted(BESIROGLU), LawPoint(1e6, 1e7, float("nan"))], "loss_nats holds a value"),
    ],
)
def test_refuses_what_it_cannot_fit(points, text):
    with pytest.raises(UserError, match=text):
        fit_chinchilla(points)
