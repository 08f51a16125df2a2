"""Batches made ahead are those made on time."""

import threading

import pytest
import torch

from plinth.training.prefetch import prefetched


def batches_at(step):
    return [(torch.full((2, 3), step), torch.full((2, 3), step + 1))] * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_any_order_of_steps_gives_the_same_batches(device):
    with prefetched(batches_at, device) as take:
        for step in (0, 1, 1, 2, 7, 8, 3, 4, 4, 5, 6):
            found, expected = take(step), batches_at(step)
            assert len(found) == 2
            assert all(torch.equal(a, b) for pair in zip(found, expected) for a, b in zip(*pair))


def test_the_next_step_is_made_in_another_thread_and_only_once():
    made, done = [], {step: threading.Event() for step in range(12)}

    def record(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        done[step].set()
        return batches_at(step)

    with prefetched(record, "cuda") as take:
        for step in range(10):
            take(step)
            assert done[step + 1].wait(10)
    assert sorted(made) == [(0, True)] + [(step, False) for step in range(1, 11)]


def test_an_error_comes_with_its_own_step():
    def failing(step):
        if step == 2:
            raise OSError("gone")
        return batches_at(step)

    with prefetched(failing, "cuda") as take:
        take(0), take(1)
        with pytest.raises(OSError, match="gone"):
            take(2)
        assert torch.equal(take(3)[0][0], batches_at(3)[0][0])


def test_on_a_cpu_nothing_is_made_ahead():
    with prefetched(batches_at, "cpu") as take:
        assert take is batches_at
