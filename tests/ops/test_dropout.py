"""Dropout: its rate, its expectation, and that its draws follow from the generator alone."""

import pytest
import torch

from plinth.ops.dropout import dropout, dropout_mask, seeded, step_seeds


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_elements_go_at_the_rate_and_the_mean_stays(rate):
    mask = dropout_mask((401, 499), rate, torch.Generator().manual_seed(0), torch.empty(0))
    gone = (mask == 0).double().mean()
    assert abs(gone - rate) < 4 * (rate * (1 - rate) / mask.numel()) ** 0.5
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}


def test_neighbours_are_independent():
    kept = dropout_mask((300_000,), 0.5, torch.Generator().manual_seed(1), torch.empty(0)) > 0
    for lag in (1, 2, 3, 4, 7):
        assert abs((kept[lag:] == kept[:-lag]).double().mean() - 0.5) < 0.005


def test_the_gradient_passes_where_elements_stay():
    x = torch.ones(64, requires_grad=True)
    y = dropout(x, 0.4, torch.Generator().manual_seed(3))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_without_generator_or_rate_nothing_happens():
    x = torch.ones(3)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, torch.Generator()) is x and seeded(None) is None


def test_a_micro_batch_drops_the_same_whenever_it_runs_and_others_drop_otherwise():
    def drawn(*place):
        return dropout_mask((1000,), 0.5, seeded(step_seeds(*place, rows=4)), torch.empty(0))

    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    assert not torch.equal(drawn(1, 2, 3), drawn(1, 2, 4)) and not torch.equal(drawn(1, 2, 3), drawn(1, 3, 3))
    assert step_seeds(1, 2, 3, 4).tolist() == [step_seeds(1, 2, 3, 1).item()] * 4
