"""Weights of 8 and 4 bits: our kernels against integers added one by one, and the law that company does not change a row."""

import pytest
import torch

from plinth.ops import kernels
from plinth.ops.quantise import LEVELS, dequantise, multiply, nearest_levels, pack, pack_quantised, quantise, slow_multiply

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels of ours here: {kernels.why_not()}")
SHAPES = [(32, 64), (96, 768), (50, 200), (17, 33), (64, 1), (1, 320), (40, 576)]
FORMATS = ["int8", "int4"]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format, error", [("int8", 0.0065), ("int4", 0.083)])
def test_error_of_normal_weights(format, error):
    weight = numbers(64, 1024)
    restored = dequantise(quantise(weight, format))
    assert (restored - weight).norm() / weight.norm() < error
    assert 0.5 * error < (restored - weight).norm() / weight.norm()


def test_int8_values_worked_by_hand():
    weight = torch.zeros(1, 66)
    weight[0, :4] = torch.tensor([127.0, -127.0, 0.4, 63.6])
    weight[0, 64:] = torch.tensor([2.0, -1.0])
    found = quantise(weight, "int8")
    assert found.values_FGK[0, 0, :4].tolist() == [127, -127, 0, 64]
    assert found.scales_FG[0, 0] == 1.0
    assert found.values_FGK[0, 1, :2].tolist() == [127, -64]  # 2 / 127 is 0.01575 in bf16, and 1 / 0.01575 is 63.5


def test_levels_are_those_of_least_error():
    """Lloyd's rounds from here on move no level: each is the mean of the numbers that are nearest to it, weighted by their scale."""
    x = numbers(100_000, 64, seed=1)
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    ratios, weights = (x / -largest).flatten(), largest.square().expand_as(x).flatten()
    levels = torch.tensor(LEVELS) / 127
    for _ in range(50):
        code = torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)
        levels = torch.bincount(code, weights * ratios) / torch.bincount(code, weights)
    assert (levels * 127 - torch.tensor(LEVELS)).abs().max() < 1.5
    assert nearest_levels()[[0, 128, 129, 255]].tolist() == [-124, 1, 1, 109]


def test_zero_groups_stay_zero():
    weight = torch.zeros(3, 130)
    weight[1, 70] = 3.0
    for format in FORMATS:
        restored = dequantise(quantise(weight, format))
        assert restored[0].abs().sum() == 0 and restored[1, :64].abs().sum() == 0
        assert restored[1, 70] == pytest.approx(3.0, rel=0.01)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_packs_what_the_twin_does(shape):
    weight = numbers(*shape)
    weight[0] = 0
    fast, slow = pack_quantised(weight, "int8"), pack(quantise(weight, "int8"))
    assert torch.equal(fast.values.flatten().view(torch.int8), slow.values.flatten())
    assert torch.equal(fast.scales, slow.scales)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_finds_4_bits_as_good_as_the_twin(shape):
    """Which of two equally good scales is taken may hang on a rounding, so groups are compared by their error."""
    weight = numbers(*shape)
    identity = torch.eye(shape[1])
    slow = dequantise(quantise(weight, "int4"))
    fast = multiply(identity, pack_quantised(weight, "int4")).T
    errors = [(restored - weight).norm(dim=1) for restored in (fast, slow)]
    torch.testing.assert_close(*errors, rtol=2e-3, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_the_twins_to_the_bit(shape, format):
    weight = quantise(numbers(*shape), format)
    packed = pack(weight)
    for rows in (1, 2, 3, 4, 7, 16, 17, 40):
        x = numbers(rows, shape[1], seed=rows) * torch.logspace(-3, 3, rows)[:, None]
        x[:, shape[1] // 2 :] *= 5
        assert torch.equal(multiply(x, packed), slow_multiply(x, weight)), rows


@needs_kernels
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_any_company(format):
    packed = pack_quantised(numbers(96, 200), format)
    x = numbers(64, 200, seed=1)
    together = multiply(x, packed)
    for rows in range(1, 64):
        assert torch.equal(multiply(x[:rows], packed), together[:rows]), rows
        assert torch.equal(multiply(x[-rows:], packed), together[-rows:]), rows
    parts = multiply(x, packed, (0, 1)) + multiply(x, packed, (1, 3))  # what was not asked for is 0
    assert torch.equal(parts, together)


@needs_kernels
@pytest.mark.parametrize("format, error", [("int8", 0.01), ("int4", 0.1)])
def test_products_come_close_to_the_weights(format, error):
    weight, x = numbers(96, 768), numbers(5, 768, seed=1)
    exact = x @ weight.T
    assert (multiply(x, pack_quantised(weight, format)) - exact).norm() / exact.norm() < error


@needs_kernels
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_not_a_number_comes_out_as_such(format, rows):
    x = numbers(rows, 128)
    x[0, 3] = torch.nan
    out = multiply(x, pack_quantised(numbers(32, 128), format))
    assert out[0].isnan().all() and out[1:].isfinite().all()
    x[0, 3] = torch.inf
    assert not multiply(x, pack_quantised(numbers(32, 128), format))[0].isfinite().any()
