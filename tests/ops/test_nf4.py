"""NF4: the levels are quantiles of the normal, the rounding keeps its bound, and the product its gradient."""

import pytest
import torch
from scipy.stats import norm

from plinth.ops.nf4 import BLOCK, LEVELS, SCALE_BLOCK, Nf4, dequantise_nf4, nf4_linear, quantise_nf4, restore_scales

OFFSET = 1 - (1 / 30 + 1 / 32) / 2  # the outermost quantile, halfway between those of 15 and of 16 levels


def drawn(*shape: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_levels_are_quantiles_of_the_normal():
    """Eight on the positive side, seven on the negative one, equally spaced in probability, and an exact zero; divided by the largest."""
    upper = [norm.ppf(OFFSET + (0.5 - OFFSET) * i / 8) for i in range(8)]
    lower = [-norm.ppf(OFFSET + (0.5 - OFFSET) * i / 7) for i in range(7)]
    levels = [level / max(upper) for level in sorted([*upper, *lower, 0.0])]
    assert levels == pytest.approx(LEVELS, abs=1e-6)
    assert len(set(LEVELS)) == 16 and list(LEVELS) == sorted(LEVELS) and LEVELS[7] == 0.0


def test_a_block_worked_by_hand():
    weight = torch.zeros(1, BLOCK)
    weight[0, :5] = torch.tensor([2.0, -2.0, 0.2, -0.75, 0.9])
    packed = quantise_nf4(weight)
    assert packed.codes_N[:3].tolist() == [15 << 4 | 0, 8 << 4 | 3, 12 << 4 | 7]
    expected = [2.0, -2.0, 2 * 0.07958029955625534, 2 * -0.39491748809814453, 2 * 0.44070982933044434]
    assert dequantise_nf4(packed)[0, :5].tolist() == pytest.approx(expected, abs=1e-6)
    assert (dequantise_nf4(packed)[0, 5:] == 0).all()


@pytest.mark.parametrize("shape", [(64, 64), (33, 50), (3, 7), (300, 129)])
def test_the_rounding_keeps_its_bound(shape):
    """An error is at most half of the widest gap of the levels times the scale, and what the scale itself was rounded by."""
    weight = drawn(*shape) * torch.logspace(-2, 1, shape[0])[:, None]  # rows of very unlike sizes
    packed = quantise_nf4(weight)
    error = torch.nn.functional.pad((dequantise_nf4(packed) - weight).flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK).abs()
    largest = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK).abs().amax(1)
    restored = restore_scales(packed.scales_G, packed.steps_S)
    steps = packed.steps_S.view(torch.float32)[:-1].repeat_interleave(SCALE_BLOCK)[: len(restored)]
    assert ((restored - largest).abs() <= steps / 2 * 1.001 + 1e-7).all()
    half_gap = max(b - a for a, b in zip(LEVELS, LEVELS[1:])) / 2
    assert (error.amax(1) <= half_gap * restored + (restored - largest).abs() + 1e-6 * largest).all()


def test_what_is_rounded_already_stays():
    once = dequantise_nf4(quantise_nf4(drawn(64, 64, scale=1.0)))
    torch.testing.assert_close(dequantise_nf4(quantise_nf4(once)), once, rtol=0, atol=0.02)
    zero = torch.zeros(8, 16)
    assert torch.equal(dequantise_nf4(quantise_nf4(zero)), zero)


def test_normal_weights_lose_as_much_as_published_and_take_four_bits():
    """The root of the mean square error is about a tenth of the weights' own; 4.13 bits a weight."""
    weight = drawn(512, 1024)
    packed = quantise_nf4(weight)
    relative = (dequantise_nf4(packed) - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert 0.08 < relative < 0.11
    assert 8 * packed.num_bytes / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.001)


def test_the_product_and_its_gradient_are_those_of_the_dequantised_weight():
    packed = quantise_nf4(drawn(48, 96))
    whole, x = dequantise_nf4(packed), drawn(2, 5, 96, seed=1, scale=1.0).requires_grad_()
    y = nf4_linear(x, packed)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, whole))
    weights = drawn(*y.shape, seed=2)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(found, weights @ whole)


def test_nothing_whole_is_kept_for_the_backward_pass():
    """What autograd saves for eight layers is their inputs; a matrix of theirs is 64 times as large."""
    saved = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    matrices = [quantise_nf4(drawn(256, 256, seed=i)) for i in range(8)]
    x = drawn(4, 256, seed=9).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = x
        for matrix in matrices:
            y = nf4_linear(y, matrix)
    y.sum().backward()
    assert sum(saved) <= 8 * x.numel() and x.grad is not None


def test_a_change_of_dtype_leaves_the_parts_as_they_are():
    packed = quantise_nf4(drawn(64, 128))
    module = torch.nn.Module()
    for name in ("codes_N", "scales_G", "steps_S"):
        module.register_buffer(name, getattr(packed, name))
    module.to(torch.bfloat16).to(torch.float32)
    again = Nf4(packed.shape, module.codes_N, module.scales_G, module.steps_S)
    assert torch.equal(dequantise_nf4(again), dequantise_nf4(packed))
    assert dequantise_nf4(packed, torch.bfloat16).dtype == torch.bfloat16
