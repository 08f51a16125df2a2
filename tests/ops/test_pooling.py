"""Pooling of a text's states: worked by hand, and padding has no say."""

import pytest
import torch

from plinth.ops.pooling import pool


def test_last_maximum_and_mean_worked_by_hand():
    hidden = torch.tensor([[[1.0, -5.0], [3.0, -7.0], [9.0, 9.0]], [[2.0, 4.0], [0.0, -2.0], [-8.0, 1.0]]])
    lengths = torch.tensor([2, 3])
    expected = [[3.0, -7.0, 3.0, -5.0, 2.0, -6.0], [-8.0, 1.0, 2.0, 4.0, -2.0, 1.0]]
    assert pool(hidden, lengths).tolist() == expected
    for kind, place in (("last", slice(0, 2)), ("max", slice(2, 4)), ("mean", slice(4, 6))):
        assert pool(hidden, lengths, kind).tolist() == [row[place] for row in expected]


@pytest.mark.parametrize("kind", ["concat", "last", "max", "mean"])
def test_neither_values_nor_gradients_know_of_padding(kind):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 4, generator=generator, requires_grad=True)
    lengths = torch.tensor([6, 1, 3])
    outside = torch.arange(6) >= lengths[:, None]
    found = pool(hidden, lengths, kind)
    for filling in (float("nan"), float("inf"), 1e9):
        assert torch.equal(pool(hidden.detach().masked_fill(outside[..., None], filling), lengths, kind), found)
    found.square().sum().backward()
    assert not hidden.grad[outside].any() and hidden.grad[~outside].any()
    alone = torch.cat([pool(row[None, :n], torch.tensor([n]), kind) for row, n in zip(hidden.detach(), lengths.tolist())])
    torch.testing.assert_close(alone, found.detach())
