"""Dropout along sequences: what is dropped together, how much, and the same again from the same seed."""

import torch

from plinth.ops.dropout import dropout_mask
from plinth.ops.sequence_dropout import locked_dropout, word_dropout


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_without_a_generator_or_a_rate_nothing_changes():
    x, tokens = torch.randn(2, 3, 4, generator=seeded()), torch.zeros(2, 3, dtype=torch.int64)
    assert locked_dropout(x, 0.5, None) is x and locked_dropout(x, 0.0, seeded()) is x
    assert word_dropout(x, tokens, 5, 0.5, None) is x


def test_the_same_seed_drops_the_same_and_the_mean_stays():
    x = torch.ones(400, 2, 500)
    first, again, other = (locked_dropout(x, 0.3, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(float(first.mean()) - 1.0) < 0.01  # 200,000 draws: a deviation of 0.0015


def test_locked_dropout_drops_a_channel_at_all_positions_of_a_sequence():
    out = locked_dropout(torch.ones(8, 6, 50), 0.5, seeded())
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert not torch.equal(out[0], out[1])


def test_word_dropout_drops_a_token_wherever_it_stands():
    tokens, table = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 3]]), torch.ones(4, 5)
    for seed in range(8):
        mask = dropout_mask((4,), 0.5, seeded(seed), table)[:, None]
        assert torch.equal(word_dropout(table[tokens], tokens, 4, 0.5, seeded(seed)), (table * mask)[tokens])  # rows of the matrix
