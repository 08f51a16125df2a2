"""Rows that go on where they stopped: each continues the last one, and a pass reads every token once."""

import pytest
import torch

from data.files import write_shards
from plinth.config import UserError
from plinth.data.contiguous import ContiguousText, share_rows

LENGTHS = [5, 9, 3, 14, 7, 11, 2, 8] * 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("contiguous") / "a", LENGTHS)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("contiguous") / "b", [4, 6, 5], first_id=5000)


def test_a_row_goes_on_where_it_stopped_until_the_pass_ends(shards):
    text = ContiguousText(shards, 3, 5, seed=1)
    assert text.steps_a_pass == (sum(LENGTHS) + len(LENGTHS)) // 15
    before = text.rows(0)
    assert before.fresh_R.all()
    for step in range(1, 3 * text.steps_a_pass):
        now = text.rows(step)
        assert bool(now.fresh_R.all()) == bool(now.fresh_R.any()) == (step % text.steps_a_pass == 0)
        assert torch.equal(now.inputs_RT[:, 1:], now.targets_RT[:, :-1])
        if not now.fresh_R.any():
            assert torch.equal(now.inputs_RT[:, 0], before.targets_RT[:, -1])
        before = now


def test_passes_follow_each_other_on_the_stream_so_that_every_token_is_read_equally_often(shards):
    text = ContiguousText(shards, 2, 4, seed=1)
    tokens = text.num_tokens
    steps = 8 * tokens // (2 * 4)  # eight epochs' worth
    read = torch.cat([text.rows(step).targets_RT.flatten() for step in range(steps)])
    ids, counts = torch.unique(read[read != 0], return_counts=True)
    assert len(ids) == sum(LENGTHS)
    assert counts.min() >= 7 and counts.max() <= 9
    assert text.epochs(steps) == pytest.approx(8, rel=1e-6)


def test_rows_are_a_function_of_seed_and_step(shards):
    first, again, other = (ContiguousText(shards, 3, 5, seed=seed).rows(7) for seed in (1, 1, 2))
    assert torch.equal(first.inputs_RT, again.inputs_RT) and not torch.equal(first.inputs_RT, other.inputs_RT)


def test_folders_share_the_rows_by_their_tokens(shards, more):
    text = ContiguousText([shards, more], 6, 5, seed=1)
    rows = text.rows(0).targets_RT
    own = (rows >= 5000).any(1)
    assert own.tolist() == [False] * 5 + [True]
    assert text.fingerprint()["rows"] == [5, 1]


def test_a_text_shorter_than_a_batch_is_read_over_and_over(more):
    text = ContiguousText(more, 4, 50, seed=1)
    assert text.steps_a_pass == 1 and text.rows(3).inputs_RT.shape == (4, 50)


def test_rows_are_shared_by_largest_remainder_and_none_is_left_out():
    assert share_rows([0.98, 0.01, 0.01], 5) == [3, 1, 1]
    assert share_rows([0.5, 0.5], 4) == [2, 2]
    assert sum(share_rows([0.2, 0.3, 0.5], 17)) == 17


def test_too_few_rows_are_refused(shards, more):
    with pytest.raises(UserError, match="1 rows cannot hold 2 shards folders"):
        ContiguousText([shards, more], 1, 5, seed=1)
    with pytest.raises(UserError, match="seq_len=0"):
        ContiguousText(shards, 1, 0, seed=1)
