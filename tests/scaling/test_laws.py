"""Published constants reproduce published numbers; the laws keep their limits."""

import math

import pytest

from plinth.scaling.laws import BESIROGLU, HOFFMANN, LAWS, MUENNIGHOFF, REPETITION, SMALL_CODE, STEP_LAW, default_law


@pytest.mark.parametrize(
    ("flops", "params", "tokens"),
    [(1e18, 80.5e6, 2.07e9), (1e19, 262e6, 6.36e9), (1e21, 2.78e9, 60.0e9), (5.76e23, 72.3e9, 1.33e12), (1e25, 312e9, 5.34e12)],
)
def test_besiroglu_compute_optimal_table(flops, params, tokens):
    assert BESIROGLU.compute_optimal(flops) == pytest.approx((params, tokens), rel=5e-3)


@pytest.mark.parametrize(
    ("flops", "params", "tokens"),
    [(1e18, 94.7e6, 1.76e9), (1e20, 775e6, 21.5e9), (1e22, 6.34e9, 263e9), (5.76e23, 40.4e9, 2.38e12)],
)
def test_hoffmann_compute_optimal_table(flops, params, tokens):
    assert HOFFMANN.compute_optimal(flops) == pytest.approx((params, tokens), rel=5e-3)


def test_compute_optimal_is_a_minimum():
    params, tokens = BESIROGLU.compute_optimal(1e20)
    best = BESIROGLU.loss(params, tokens)
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert BESIROGLU.loss(params * factor, tokens / factor) > best
    assert 6 * params * tokens == pytest.approx(1e20)
    assert BESIROGLU.optimal_params(tokens) == pytest.approx(params)


def test_muennighoff_constants_round_to_the_published_ones():
    published = (MUENNIGHOFF.irreducible, MUENNIGHOFF.param_coefficient, MUENNIGHOFF.token_coefficient)
    assert published == pytest.approx((1.87, 521, 1488), rel=2e-3)


def test_bits_per_byte_of_a_law_in_bytes_is_its_loss_in_bits():
    assert SMALL_CODE.bytes_per_token == 1
    assert SMALL_CODE.bits_per_byte(1e5, 1e7) == pytest.approx(SMALL_CODE.loss(1e5, 1e7) / math.log(2))


def test_repetition_limits():
    assert REPETITION.effective_tokens(100.0, 60.0) == 60.0
    assert REPETITION.effective_tokens(100.0, 100.0) == 100.0
    four = REPETITION.effective_tokens(100.0, 400.0)
    assert four == pytest.approx(100 * (1 + 15.387756 * (1 - math.exp(-3 / 15.387756))))
    assert 0.9 < four / 400 < 1.0  # four epochs are worth nearly as much as fresh text
    assert REPETITION.effective_tokens(100.0, 1e9) == pytest.approx(100 * 16.387756)
    assert REPETITION.effective_params(10.0, 1e9) == pytest.approx(10 * 6.309743)


def test_repetition_is_smooth_at_one_epoch():
    step = 1e-6
    slope = (REPETITION.effective_tokens(1.0, 1.0 + step) - 1.0) / step
    assert slope == pytest.approx(1.0, rel=1e-4)


def test_step_law_worked_by_hand():
    # 1e9 parameters, 1e11 tokens: 1.79 * 10^(-0.713*9) * 10^(0.307*11) and 0.58 * 10^(0.571*11)
    assert STEP_LAW.lr(1e9, 1e11) == pytest.approx(1.79 * 10 ** (-6.417 + 3.377), rel=1e-9)
    assert STEP_LAW.tokens_per_step(1e11) == pytest.approx(0.58 * 10**6.281, rel=1e-9)
    assert STEP_LAW.lr(1e4, 1e9) == STEP_LAW.max_lr


def test_default_law_is_the_one_fitted_nearest():
    assert default_law(1e13) is SMALL_CODE
    assert default_law(1e21) is BESIROGLU


def test_small_law_is_in_range_where_it_is_used_and_published_ones_are_not():
    assert not SMALL_CODE.is_outside(1e5, 1e7)
    assert BESIROGLU.is_outside(1e6, 1e7)
    assert all(law.source for law in LAWS.values())
