"""The batches of a training on parallel text: like lengths together, each micro-batch with the seed of what it drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from plinth.data.buckets import LengthBuckets
from plinth.data.parallel import ParallelText
from plinth.ops.dropout import step_seeds
from plinth.posttraining.batches import describe_examples

Batch = tuple[torch.Tensor, ...]


class ParallelBatches:
    """Deals the pairs of a parallel text into steps; a pure function of (seed, step)."""

    def __init__(self, text: ParallelText, pairs_per_step: int, micro_batch_size: int, seed: int):
        self._text, self._seed = text, seed
        self._buckets = LengthBuckets(text.lengths, pairs_per_step, micro_batch_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        return self._buckets.steps_per_epoch

    def steps_for(self, epochs: float) -> int:
        """Return the steps of so many passes over the pairs, at least one."""
        return self._buckets.steps_for(epochs, None)

    def at(self, step: int) -> Sequence[Batch]:
        """Return a step's micro-batches: source (B, S), its mask (B, S), inputs (B, T), targets (B, T), seeds of dropout (B,)."""
        return [
            (*self._text.batch(part), step_seeds(self._seed, step, number, len(part)))
            for number, part in enumerate(self._buckets.indices(step))
        ]

    def describe(self, step: int, rows: Sequence[int] | None, source_text: Callable[[Sequence[int]], str]) -> str:
        """Name the pairs in some rows of a step, or in all of it; `source_text` decodes tokens."""
        indices = np.concatenate(self._buckets.indices(step)).tolist()
        return describe_examples("pair", indices, rows, lambda i: source_text(self._text.sources[i].tolist()))
