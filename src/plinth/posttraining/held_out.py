"""Rows that training never sees, measured while it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from plinth.training.config import TrainConfig
from plinth.training.device import move_batch
from plinth.training.step import Batch, LossFunction, Sum, read_scalars, start_workers

PREFIX = "held_out_"


class HeldOut:
    """The loss of held-out rows and its metrics, every so many updates and after the last; call it with the updates made.

    Sums and counts are divided once, as in training, so the values do not depend on how the rows are cut into micro-batches. Batches
    come shortest first. Threads take them longest first, so that they end together; sums are taken in the order of the batches.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, batches: Callable[[], Sequence[Batch]], every: int):
        self.model, self.loss, self.batches, self.every = model, loss, batches, every
        self.steps, self.device, self.num_threads = 0, "cpu", 1

    def begin(self, train: TrainConfig) -> None:
        """Take from the resolved configuration where to compute, in how many threads, and which update is the last."""
        self.steps, self.device, self.num_threads = train.steps or 0, train.device or "cpu", train.num_threads or 1

    def __call__(self, steps: int) -> dict[str, float]:
        if steps % self.every and steps != self.steps:
            return {}
        with contextlib.closing(start_workers(self.num_threads, self.device)) as workers:
            found = workers.map(self._measure, self.batches()[::-1])[::-1]
        count = sum(read_scalars([part[1] for part in found]))
        loss = sum(read_scalars([part[0] for part in found])) / count
        metrics = {name: sum(read_scalars([part[2][name] for part in found])) / count for name in found[0][2]}
        return {f"{PREFIX}loss_nats": loss, **{PREFIX + name: value for name, value in metrics.items()}}

    def _measure(self, batch: Batch) -> tuple[torch.Tensor, Sum, dict[str, Sum]]:
        with torch.no_grad():  # which each thread has for itself
            return self.loss(self.model, move_batch(batch, self.device))


def last_held_out(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured of held-out rows after the last update."""
    return {name: value for name, value in metrics[-1].items() if name.startswith(PREFIX)} if metrics else {}


def held_out_hooks(held_out: HeldOut | None) -> dict[str, Any]:
    """Return the hooks of a Job that measure held-out rows; none where there are none."""
    return {} if held_out is None else {"begin": lambda run, config: held_out.begin(config.train), "step_metrics": held_out}
