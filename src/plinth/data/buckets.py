"""Examples of unequal length dealt into micro-batches: those of like lengths together, or several whole ones in a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from plinth.data.order import keyed_hash, permutation
from plinth.data.packing import best_fit_decreasing

WIDTH_STEP = 8  # widths of padded batches are multiples of it: few shapes, so kernels and memory are used again
UNCOUNTED = -1  # a target that no loss counts


class LengthBuckets:
    """Deals examples into steps so that a micro-batch holds like lengths; a pure function of (seed, step).

    A step has micro-batches of one size, at most `micro_batch_size`, together `examples_per_step` or, where these do not go into equal
    parts, the least more that do. Each epoch shows every example once, in an order of its own. Within `spread` steps' worth of examples
    the order is sorted by length and cut into micro-batches, whose order is then drawn again.
    """

    def __init__(self, lengths: Sequence[int], examples_per_step: int, micro_batch_size: int, seed: int, spread: int = 8):
        self.lengths = np.asarray(lengths)
        self.micro_batches_per_step = -(-examples_per_step // min(micro_batch_size, examples_per_step))
        self.micro_batch_size = -(-examples_per_step // self.micro_batches_per_step)
        self.seed, self.spread = seed, spread
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._num_micro_batches // self.micro_batches_per_step)

    def steps_for(self, epochs: float, tokens: int | None) -> int:
        """Return the steps of so many epochs, or of so many tokens with padding, at least one."""
        if tokens is not None:
            epochs = tokens / self.padded_tokens()
        return max(1, round(self.steps_per_epoch * epochs))

    def padded_tokens(self) -> int:
        """Return the tokens of the first epoch with padding."""
        return sum(len(part) * padded_width(int(self.lengths[part].max()) - 1) for part in self._deal(0))

    @property
    def _num_micro_batches(self) -> int:
        return -(-len(self.lengths) // self.micro_batch_size)

    def rows(self, step: int) -> list[list[np.ndarray]]:
        """Return of each micro-batch of a step the rows, each as the number of its one example."""
        return [list(part[:, None]) for part in self.indices(step)]

    def indices(self, step: int) -> list[np.ndarray]:
        """Return the example numbers of each micro-batch of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._deal(epoch))
        n = self.micro_batches_per_step
        return self._epoch[1][place * n : (place + 1) * n]

    def _deal(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = rng.permutation(len(self.lengths))
        window = self.micro_batch_size * self.micro_batches_per_step * self.spread
        sorted_parts = [part[np.argsort(self.lengths[part], kind="stable")] for part in np.split(order, range(window, len(order), window))]
        order = np.concatenate(sorted_parts)
        batches = np.split(order, range(self.micro_batch_size, len(order), self.micro_batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]


class PackedExamples:
    """Deals whole examples into steps, several in a row of `width` tokens, packed by best fit over the whole set.

    No example is cut or left out. A pure function of (seed, step): each epoch shows every example once, the rows in an order of its own,
    and examples of equal length change places. A step holds about `examples_per_step` examples, a micro-batch `micro_batch_size`.
    `lengths` are what each takes of a row, 1 to `width`.
    """

    def __init__(self, lengths: Sequence[int], width: int, examples_per_step: int, micro_batch_size: int, seed: int):
        self.lengths, self.width, self.seed = np.asarray(lengths), width, seed
        self._row_of_rank = best_fit_decreasing(np.sort(self.lengths)[::-1], width)
        self.num_rows = int(self._row_of_rank.max()) + 1
        examples_per_row = len(self.lengths) / self.num_rows
        self.rows_per_micro_batch = max(1, round(min(micro_batch_size, examples_per_step) / examples_per_row))
        self.micro_batches_per_step = max(1, round(examples_per_step / (self.rows_per_micro_batch * examples_per_row)))
        self._epoch: tuple[int, list[list[np.ndarray]]] = (-1, [])

    @property
    def fill(self) -> float:
        """Return the share of the rows that examples take; the rest is padding."""
        return float(self.lengths.sum()) / (self.num_rows * self.width)

    @property
    def steps_per_epoch(self) -> int:
        micro_batches = -(-self.num_rows // self.rows_per_micro_batch)
        return -(-micro_batches // self.micro_batches_per_step)

    def steps_for(self, epochs: float, tokens: int | None) -> int:
        """Return the steps of so many epochs, or of so many tokens with padding, at least one."""
        if tokens is not None:
            epochs = tokens / self.padded_tokens()
        return max(1, round(self.steps_per_epoch * epochs))

    def padded_tokens(self) -> int:
        """Return the tokens of an epoch with padding."""
        return self.num_rows * padded_width(self.width)

    def rows(self, step: int) -> list[list[np.ndarray]]:
        """Return of each micro-batch of a step the rows, each as the numbers of its examples in order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._deal(epoch))
        n = self.micro_batches_per_step
        return self._epoch[1][place * n : (place + 1) * n]

    def _deal(self, epoch: int) -> list[list[np.ndarray]]:
        chance = keyed_hash(np.arange(len(self.lengths)), self.seed, epoch, 0)
        ranked = np.lexsort((chance, -self.lengths))
        within = np.lexsort((chance[ranked], self._row_of_rank))  # within a row not the longest first
        rows = np.split(ranked[within], np.cumsum(np.bincount(self._row_of_rank))[:-1])
        order = permutation(self.num_rows, self.seed, epoch, 1)
        n = self.rows_per_micro_batch
        return [[rows[i] for i in order[start : start + n]] for start in range(0, len(order), n)]


class EvenMicroBatches:
    """Deals examples into steps whose micro-batches hold about as many tokens, for batches without padding; a function of (seed, step).

    Each epoch shows every example once, in an order of its own. A step's longest examples are dealt first, each to the micro-batch with
    the fewest tokens, so that threads which share a step end together.
    """

    def __init__(self, lengths: Sequence[int], examples_per_step: int, micro_batch_size: int, seed: int):
        self.lengths, self.examples_per_step, self.seed = np.asarray(lengths), examples_per_step, seed
        self.micro_batches_per_step = -(-examples_per_step // min(micro_batch_size, examples_per_step))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.examples_per_step)

    def steps_for(self, epochs: float, tokens: int | None) -> int:
        """Return the steps of so many epochs, or of so many tokens, at least one."""
        if tokens is not None:
            epochs = tokens / self.padded_tokens()
        return max(1, round(self.steps_per_epoch * epochs))

    def padded_tokens(self) -> int:
        """Return the tokens of an epoch; there is next to no padding."""
        return int(self.lengths.sum())

    def rows(self, step: int) -> list[list[np.ndarray]]:
        """Return of each micro-batch of a step its one row, as the numbers of its examples in order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = permutation(len(self.lengths), self.seed, epoch)[place * self.examples_per_step :][: self.examples_per_step]
        shares: list[list[int]] = [[] for _ in range(min(self.micro_batches_per_step, len(chosen)))]
        tokens = [0] * len(shares)
        for i in chosen[np.argsort(-self.lengths[chosen], kind="stable")].tolist():
            emptiest = tokens.index(min(tokens))
            shares[emptiest].append(i)
            tokens[emptiest] += int(self.lengths[i])
        return [[np.array(share)] for share in shares]


def like_lengths(lengths: Sequence[int], micro_batch_size: int) -> list[np.ndarray]:
    """Return the numbers of rows of like lengths, a micro-batch each, the shortest first."""
    return np.array_split(np.argsort(lengths, kind="stable"), max(1, -(-len(lengths) // micro_batch_size)))


def padded_width(width: int) -> int:
    """Return the width that rows of `width` inputs are padded to."""
    return -(-width // WIDTH_STEP) * WIDTH_STEP
