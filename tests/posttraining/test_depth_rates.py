"""Discriminative rates, the slanted triangle and gradual unfreezing against their closed forms; what is frozen does not move at all."""

import pytest
import torch
from torch import nn

from plinth.config import UserError
from plinth.posttraining.depth_rates import RateConfig, Unfreezing, depth_scales
from plinth.training.optim import OptimizerConfig, Scale, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.schedule import slanted_triangular
from plinth.training.step import InlineWorker


def paper(t, steps, cut_fraction, ratio):
    """Equation 3 of Howard and Ruder 2018, as it stands there."""
    cut = int(steps * cut_fraction)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(("steps", "cut_fraction", "ratio"), [(100, 0.1, 32.0), (40, 0.25, 8.0), (1000, 0.1, 10.0)])
def test_the_slanted_triangle_is_the_papers_where_its_cut_is_whole(steps, cut_fraction, ratio):
    for t in range(steps):
        ours = slanted_triangular(t, steps=steps, cut_fraction=cut_fraction, ratio=ratio)
        assert ours == pytest.approx(paper(t, steps, cut_fraction, ratio), abs=1e-12)


def test_the_slanted_triangle_by_hand():
    values = [slanted_triangular(t, steps=10, cut_fraction=0.2, ratio=5.0) for t in range(10)]
    assert values == pytest.approx([0.2, 0.6, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 19, 109])
def test_the_slanted_triangle_never_falls_below_its_floor(steps):
    values = [slanted_triangular(t, steps=steps) for t in range(steps)]
    assert min(values) >= 1 / 32 and max(values) <= 1.0
    assert max(values) == 1.0 or steps == 1
    assert steps != 109 or paper(108, 109, 0.1, 32.0) < 0  # what the paper's form gives there


def test_rates_fall_by_the_factor_a_group():
    scales = depth_scales([["a"], ["b", "c"], ["d"]], 2.6)
    assert {name: scale.lr for name, scale in scales.items()} == pytest.approx({"a": 1 / 2.6**2, "b": 1 / 2.6, "c": 1 / 2.6, "d": 1.0})
    assert {scale.lr for scale in depth_scales([["a"], ["d"]], 1.0).values()} == {1.0}


def test_one_group_more_learns_every_so_many_steps():
    plan = Unfreezing.plan("gradual", 4, 20, 3)
    assert [plan.frozen_at(step) for step in range(20)] == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 11
    assert [plan.begin_of(group) for group in range(4)] == [9, 6, 3, 0]
    rates = RateConfig(cut_fraction=1 / 3)
    scale = [plan.slanted_scale(step, rates) for step in range(20)]
    assert scale[0] == scale[3] == scale[6] == scale[9] == 1 / 32 and scale[1] == scale[4] == scale[7] == 1.0
    assert scale[12] == 1.0  # a third of the last eleven steps, rounded down
    assert Unfreezing.plan("all", 4, 20, 3).frozen == (0,) and Unfreezing.plan("all", 4, 20, 3).begin_of(0) == 0
    head = Unfreezing.plan("head", 4, 20, 3)
    assert head.frozen_at(19) == 3 and [head.begin_of(group) for group in range(4)] == [20, 20, 20, 0]


def test_a_training_too_short_to_unfreeze_all_is_refused():
    with pytest.raises(UserError, match="one of 4 groups more learn every 3 updates, but there are 9"):
        Unfreezing.plan("gradual", 4, 9, 3)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.early = nn.Parameter(torch.ones(3, 3))
        self.late = nn.Parameter(torch.ones(3, 3))

    def matrix_parts(self):
        return {"early": (3,), "late": (3,)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_begins_later_does_not_move_before_and_then_moves_as_if_training_had_begun(name):
    config = OptimizerConfig(name=name, lr=0.1, muon_lr=0.1, weight_decay=0.5)
    masters = MasterWeights(Two(), torch.float32)
    optimizer = build_optimizer(masters, config, {"late": Scale(begin=2)})
    grads = [torch.randn(3, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    seen = []
    for i, grad in enumerate(grads):
        early = grads[i - 2] if i >= 2 else torch.zeros(3, 3)
        optimizer.step({"early": early.clone(), "late": grad.clone()}, 1.0, InlineWorker())
        seen.append(masters.tensors["late"].clone())
    assert torch.equal(seen[0], torch.ones(3, 3)) and torch.equal(seen[1], torch.ones(3, 3))
    fresh = MasterWeights(Two(), torch.float32)
    other = build_optimizer(fresh, config)
    for grad in grads[2:]:
        other.step({"early": torch.zeros(3, 3), "late": grad.clone()}, 1.0, InlineWorker())
    torch.testing.assert_close(seen[3], fresh.tensors["late"], rtol=1e-6, atol=1e-6)
