"""The next step's batches, made in a thread while this step computes.

It pays where the computing is done by a GPU that would wait meanwhile. On a CPU the cores are busy and making a batch takes a small
share of a step (docs/loader.md), so there is nothing to gain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from plinth.training.device import pin_batch
from plinth.training.step import Batch


@contextlib.contextmanager
def prefetched(batches_at: Callable[[int], Sequence[Batch]], device: str) -> Iterator[Callable[[int], Sequence[Batch]]]:
    """Give a function with the same results as `batches_at`, which must be pure.

    For a GPU, asking for a step starts making the next one, in pinned memory; steps may still be asked for in any order, also twice.
    An error in making a step is raised when that step is asked for. For a CPU the function is `batches_at` itself.
    """
    if device == "cpu":
        yield batches_at
        return
    waiting: dict[int, Future] = {}

    def make(step: int) -> Sequence[Batch]:
        return [pin_batch(batch) for batch in batches_at(step)]

    with ThreadPoolExecutor(1) as pool:

        def take(step: int) -> Sequence[Batch]:
            ready = waiting.pop(step, None)
            if step + 1 not in waiting:
                waiting.clear()
                waiting[step + 1] = pool.submit(make, step + 1)
            return make(step) if ready is None else ready.result()

        yield take
