"""Rates that differ by depth and by time: discriminative rates, the slanted triangle, gradual unfreezing.

Source: Howard and Ruder 2018, arXiv:1801.06146, sections 3.2 and 3.3.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from plinth.config import UserError
from plinth.training.config import Scale
from plinth.training.schedule import slanted_triangular

Unfreeze = Literal["gradual", "all", "head"]


@dataclass(frozen=True)
class RateConfig:
    """How learning rates fall with depth, and rise and fall with time."""

    depth_factor: float = 2.6
    """each group of layers learns so many times slower than the one above it; 1: all alike"""
    slanted: bool = True
    """the slanted triangular schedule; without it, train's warm-up and decay"""
    cut_fraction: float = 0.1
    """share of the updates over which the rate rises (slanted)"""
    cut_ratio: float = 32.0
    """how many times smaller the rate is at the ends than at its peak (slanted)"""

    def __post_init__(self) -> None:
        if self.depth_factor < 1 or self.cut_ratio < 1:
            raise UserError(f"depth_factor={self.depth_factor} and cut_ratio={self.cut_ratio} must be at least 1.")
        if not 0 < self.cut_fraction < 1:
            raise UserError(f"cut_fraction={self.cut_fraction} must lie between 0 and 1.")


@dataclass(frozen=True)
class Unfreezing:
    """Which groups learn when: stretches of steps, in each of which the lowest groups stay as they are."""

    starts: tuple[int, ...]
    """first step of each stretch, counted from 0"""
    frozen: tuple[int, ...]
    """groups, counted from the input, that do not learn in it"""
    steps: int
    """updates in all"""

    @classmethod
    def plan(cls, kind: Unfreeze, num_groups: int, steps: int, steps_a_group: int) -> Unfreezing:
        """Return gradual unfreezing, one group more every `steps_a_group`, from the top; or all groups at once; or the top one alone.

        Raises UserError when the training ends before the last group learns.
        """
        if kind != "gradual":
            return cls((0,), (num_groups - 1 if kind == "head" else 0,), steps)
        starts = tuple(i * steps_a_group for i in range(num_groups))
        if starts[-1] >= steps:
            raise UserError(
                f"unfreeze=gradual lets one of {num_groups} groups more learn every {steps_a_group} updates, but there are {steps}. "
                "Raise epochs, lower unfreeze-epochs, or take unfreeze=all."
            )
        return cls(starts, tuple(range(num_groups - 1, -1, -1)), steps)

    def frozen_at(self, step: int) -> int:
        """Return how many groups, counted from the input, do not learn at a step."""
        return self.frozen[bisect_right(self.starts, step) - 1]

    def begin_of(self, group: int) -> int:
        """Return the first step at which a group learns; `steps` where it never does."""
        return next((start for start, frozen in zip(self.starts, self.frozen) if group >= frozen), self.steps)

    def slanted_scale(self, step: int, rates: RateConfig) -> float:
        """Return the factor of the rates at a step: a slanted triangle over each stretch, as fastai's course has it.

        Differs: the paper does not say whether its triangle spans the stretches or begins anew in each.
        """
        place = bisect_right(self.starts, step) - 1
        stop = self.starts[place + 1] if place + 1 < len(self.starts) else self.steps
        start = self.starts[place]
        return slanted_triangular(step - start, steps=stop - start, cut_fraction=rates.cut_fraction, ratio=rates.cut_ratio)


def depth_scales(groups: Sequence[Sequence[str]], factor: float, unfreezing: Unfreezing | None = None) -> dict[str, Scale]:
    """Return each parameter's factor on the rate, 1 / factor ** (groups above its own), and when it begins to learn."""
    top = len(groups) - 1
    return {
        name: Scale(lr=factor ** (i - top), begin=0 if unfreezing is None else unfreezing.begin_of(i))
        for i, group in enumerate(groups)
        for name in group
    }
