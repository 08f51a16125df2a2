"""Laws of bucketing and padding."""

import numpy as np
import pytest
import torch

from plinth.data.buckets import UNCOUNTED, LengthBuckets
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.sft import join_examples
from plinth.tokenizer.chat import Rendered


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own():
    lengths = np.random.default_rng(0).integers(3, 40, 101)
    buckets = LengthBuckets(lengths, examples_per_step=16, micro_batch_size=8, seed=3)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * buckets.steps_per_epoch, (epoch + 1) * buckets.steps_per_epoch)
        epochs.append([int(i) for step in steps for part in buckets.indices(step) for i in part])
        assert sorted(epochs[-1]) == list(range(101))
    assert epochs[0] != epochs[1]


def test_a_step_is_a_function_of_seed_and_step_alone():
    lengths = list(range(5, 60))
    straight = LengthBuckets(lengths, 8, 4, seed=1)
    forward = [straight.indices(step) for step in range(20)]
    jumping = LengthBuckets(lengths, 8, 4, seed=1)
    for step in (17, 2, 9):
        assert all(np.array_equal(a, b) for a, b in zip(jumping.indices(step), forward[step]))


def test_like_lengths_lie_together():
    lengths = np.random.default_rng(0).integers(3, 100, 4096)
    buckets = LengthBuckets(lengths, 128, 64, seed=0)
    padded = sum(len(part) * lengths[part].max() for step in range(buckets.steps_per_epoch) for part in buckets.indices(step))
    assert padded < 1.1 * lengths.sum()


def test_padding_shifts_by_one_and_counts_only_the_mask():
    inputs, targets = pad_rows([[5, 6, 7, 8], [9, 4]], [[False, False, True, True], [False, True]], pad_id=1)
    assert inputs.tolist() == [[5, 6, 7, 1, 1, 1, 1, 1], [9, 1, 1, 1, 1, 1, 1, 1]]
    assert targets[:, :3].tolist() == [[UNCOUNTED, 7, 8], [4, UNCOUNTED, UNCOUNTED]]
    assert (targets[:, 3:] == UNCOUNTED).all()
    assert inputs.dtype == torch.int64


def test_steps_follow_epochs_or_tokens():
    buckets = LengthBuckets([20] * 100, 10, 5, seed=0)
    assert buckets.steps_for(3.0, None) == 30
    assert buckets.padded_tokens() == 100 * 24  # 19 inputs, padded to a multiple of 8
    assert buckets.steps_for(3.0, 2400) == 10
    assert buckets.steps_for(3.0, 1) == 1


def test_joining_keeps_every_conversation_once_a_round_and_every_mask():
    examples = [Rendered([100 + i] * (1 + i % 5) + [1], [False] * (1 + i % 5) + [True]) for i in range(50)]
    joined = join_examples(examples, turns=4, rounds=3, max_seq_len=12, seed=0)
    assert sorted(t for e in joined for t in e.tokens) == sorted(3 * [t for e in examples for t in e.tokens])
    assert all(mask == (token == 1) for e in joined for token, mask in zip(e.tokens, e.loss_mask))
    assert max(len(e.tokens) for e in joined) <= 12
    turns = [sum(e.loss_mask) for e in joined]
    assert set(turns) == {1, 2, 3, 4} and turns.count(1) > len(turns) / 3


@pytest.mark.parametrize("per_step, micro, sizes", [(30, 16, [15, 15]), (16, 64, [16]), (128, 16, [16] * 8), (10, 4, [4, 4, 4])])
def test_a_step_holds_what_was_asked_for_in_equal_parts(per_step, micro, sizes):
    buckets = LengthBuckets([20] * 480, per_step, micro, seed=0)
    assert [len(part) for part in buckets.indices(0)] == sizes
