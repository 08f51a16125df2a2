"""The frame of stages that learn from their own completions: a roll-out every few updates, and the updates' batches out of it.

Roll-out r is sampled before update r · epochs · minibatches from the weights as they are then, and everything random in it depends on
the seed and on r alone. What it holds is part of the checkpoint, so a run that is cut off between two roll-outs goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.posttraining.rollouts import Rows, take_rows

Collect = Callable[[int], tuple[Rows, dict[str, float]]]
"""roll-out number -> rows (tensors with the same first dimension, as `Rollouts.rows` gives them and more) and its metrics"""


@dataclass
class RolloutBatches:
    """Gives each update its micro-batches; goes into Job.batches_at, Job.step_metrics and, being Stateful, Job.extra_state."""

    collect: Collect
    """samples and scores one roll-out with the weights as they are"""
    epochs: int = 1
    """passes over a roll-out"""
    minibatches: int = 1
    """updates a pass"""
    micro_batch_size: int = 64
    """completions a forward pass, whole groups: at least one group"""
    group_size: int = 1
    """rows that stay together, one after the other"""
    seed: int = 0
    """of the order of rows"""
    reshuffle: bool = True
    """deal each pass anew"""
    number: int = field(default=-1, init=False)
    """the roll-out that is held"""

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        self._rows: Rows = {}
        self._metrics: dict[str, float] = {}

    @property
    def updates(self) -> int:
        """Updates a roll-out."""
        return self.epochs * self.minibatches

    def batches_at(self, step: int) -> list[Rows]:
        """Return the micro-batches of a step counted from 0; at the first of a roll-out it is sampled.

        Raises ValueError for a step of another roll-out than the one held and the next: its weights are not at hand.
        """
        number, update = divmod(step, self.updates)
        if number != self.number:
            if update:
                raise ValueError(f"step {step} is within roll-out {number}, and roll-out {self.number} is held: it can't be sampled again.")
            self._rows, self._metrics = self.collect(number)
            self.number = number
        return [take_rows(self._rows, part) for part in self._parts(number, update)]

    def _parts(self, number: int, update: int) -> list[torch.Tensor]:
        """Return the rows of each micro-batch: groups dealt anew for each pass, like lengths together within an update."""
        epoch, minibatch = divmod(update, self.minibatches)
        groups = len(self._rows["mask"]) // self.group_size
        if groups < self.minibatches:
            raise UserError(
                f"a roll-out has {groups} groups for minibatches={self.minibatches}. Sample more prompts, or lower minibatches."
            )
        order = np.random.Generator(np.random.PCG64([self.seed, number, epoch if self.reshuffle else 0])).permutation(groups)
        chosen = order[groups * minibatch // self.minibatches : groups * (minibatch + 1) // self.minibatches]
        lengths = (self._rows["mask"].sum(1) + self._rows["prompt_tokens"]).view(groups, self.group_size).amax(1).numpy()
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        per_part = max(1, self.micro_batch_size // self.group_size)
        rows = torch.from_numpy(chosen)[:, None] * self.group_size + torch.arange(self.group_size)
        return [part.flatten() for part in rows.split(per_part)]

    def metrics(self, steps: int) -> dict[str, float]:
        """Return the metrics of the roll-out that the update before `steps` learnt from."""
        return {"rollout": self.number, **self._metrics}

    def state_dict(self) -> dict[str, Any]:
        """Return the roll-out that is held."""
        return {**self._rows, "number": self.number, "metrics": self._metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a roll-out."""
        self._rows = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        self.number, self._metrics = state["number"], state["metrics"]


def choose_prompts(count: int, size: int, seed: int, number: int, attempt: int = 0) -> list[int]:
    """Return which of `count` prompts a roll-out asks: each once a pass, in a new order each pass; further attempts draw freely."""
    if attempt:
        rng = np.random.Generator(np.random.PCG64([seed, number, attempt]))
        return rng.choice(count, size, replace=size > count).tolist()
    places = range(number * size, (number + 1) * size)
    orders = {turn: np.random.Generator(np.random.PCG64([seed, turn])).permutation(count) for turn in {place // count for place in places}}
    return [int(orders[place // count][place % count]) for place in places]
