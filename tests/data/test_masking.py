"""Which tokens are hidden: exact counts, never special tokens, the three fates in their shares, new in every step."""

import numpy as np
import pytest

from plinth.config import UserError
from plinth.data.masking import MaskingConfig, mask_tokens
from plinth.data.rows import IGNORE

ORDINARY, MASK = np.arange(10, 1000), 5


def hide(tokens, maskable, seed=0, config=None):
    rng = np.random.Generator(np.random.PCG64(seed))
    return mask_tokens(tokens, maskable, MASK, ORDINARY, config or MaskingConfig(), rng)


def rows(count, width):
    return np.random.Generator(np.random.PCG64(9)).integers(10, 1000, size=(count, width))


def test_each_row_hides_its_share_and_keeps_the_rest():
    tokens, maskable = rows(4, 100), np.ones((4, 100), dtype=bool)
    maskable[1, 20:], maskable[2, 2:], maskable[3] = False, False, False
    inputs, targets = hide(tokens, maskable)
    assert (targets != IGNORE).sum(1).tolist() == [15, 3, 1, 0]
    assert not (targets != IGNORE)[~maskable].any()
    hidden = targets != IGNORE
    assert (targets[hidden] == tokens[hidden]).all() and (inputs[~hidden] == tokens[~hidden]).all()


def test_of_the_hidden_eight_in_ten_are_masked_one_random_one_left():
    tokens = rows(200, 100)
    inputs, targets = hide(tokens, np.ones(tokens.shape, dtype=bool))
    hidden = targets != IGNORE
    masked, kept = (inputs == MASK)[hidden], (inputs == tokens)[hidden]
    n = hidden.sum()
    assert n == 3000
    assert abs(masked.mean() - 0.8) < 3 * (0.16 / n) ** 0.5 and abs(kept.mean() - 0.1) < 3 * (0.09 / n) ** 0.5
    assert np.isin(inputs[hidden & (inputs != MASK)], ORDINARY).all()


def test_masks_follow_from_the_generator_alone_and_spread_over_the_row():
    tokens = rows(400, 20)
    maskable = np.ones(tokens.shape, dtype=bool)
    assert all((a == b).all() for a, b in zip(hide(tokens, maskable, 3), hide(tokens, maskable, 3)))
    first, second = hide(tokens, maskable, 3)[1], hide(tokens, maskable, 4)[1]
    assert (first != second).any()
    places = (first != IGNORE).mean(0)
    assert places.min() > 0.08 and places.max() < 0.22  # 3 of 20 a row: 0.15 at each place


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.0}, {"masked": 0.9, "random": 0.2}, {"random": -0.1}])
def test_shares_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="must"):
        MaskingConfig(**wrong)
