"""Schedules: functions from the step to a factor of the peak learning rate, and to the rows of its batch."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plinth.config import UserError


def warmup_stable_decay(step: int, *, steps: int, warmup_steps: int, decay_steps: int, floor: float = 0.0, linear: bool = False) -> float:
    """Rise linearly over `warmup_steps`, stay at 1, fall as 1 - sqrt, or linearly, over the last `decay_steps` to `floor`.

    `step` counts from 0.  Source: Hägele et al. 2024, arXiv:2405.18392 (the 1 - sqrt cooldown).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decayed = step - (steps - decay_steps)
    if decayed < 0:
        return 1.0
    if linear:
        return floor + (1.0 - floor) * (1.0 - decayed / decay_steps)
    return floor + (1.0 - floor) * (1.0 - math.sqrt((decayed + 1) / (decay_steps + 1)))


def slanted_triangular(step: int, *, steps: int, cut_fraction: float = 0.1, ratio: float = 32.0) -> float:
    """Rise linearly from 1 / ratio to 1 over the first `cut_fraction` of the steps, at least one, and fall linearly back over the rest.

    `step` counts from 0.  Source: Howard and Ruder 2018, arXiv:1801.06146, equation 3.
    Differs: the paper falls over cut · (1 / cut_fraction - 1) steps, with cut rounded down, which ends before the training does and then
    gives negative rates; ours falls over the steps that are left. Where cut_fraction · steps is whole the two are equal.
    """
    cut = min(max(1, math.floor(steps * cut_fraction)), steps)
    share = step / cut if step < cut else 1.0 - (step - cut) / max(1, steps - cut)
    return (1.0 + share * (ratio - 1.0)) / ratio


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one shape of batch."""

    share: float
    """share of all tokens"""
    seq_len: int
    """tokens a sequence"""
    sequences_per_step: int
    """sequences an update"""

    def __post_init__(self) -> None:
        if self.share <= 0 or self.seq_len < 1 or self.sequences_per_step < 1:
            raise UserError(
                f"stage share={self.share}, seq_len={self.seq_len}, sequences_per_step={self.sequences_per_step}: "
                "the share must be positive and the other two at least 1."
            )

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.sequences_per_step


class Rows(NamedTuple):
    """The rows of one step: `num_rows` of them, `seq_len` tokens each, from row `first` on in that length."""

    first: int
    num_rows: int
    seq_len: int


class BatchSchedule:
    """Which rows each step takes when the length of the sequences or their number changes on the way.

    A pure function of the step: `steps` updates are divided over the stages so that each gets its share of the tokens
    (scaled to sum 1), to the nearest step and at least one. A stage begins where the tokens before it end, at the next
    whole row of its own length.
    """

    def __init__(self, stages: Sequence[Stage], steps: int):
        if not stages or steps < len(stages):
            raise UserError(f"{len(stages)} stages need at least as many steps; steps={steps}. Train longer or name fewer stages.")
        self.stages, self.steps = tuple(stages), steps
        updates = [stage.share / stage.tokens_per_step for stage in stages]
        total = math.fsum(updates)
        self.ends: list[int] = []
        for i in range(len(stages)):
            end = round(steps * math.fsum(updates[: i + 1]) / total)
            earliest = self.ends[-1] + 1 if self.ends else 1
            self.ends.append(min(max(end, earliest), steps - (len(stages) - 1 - i)))
        starts = [0, *self.ends]
        self.tokens_before = [0]
        for stage, start, end in zip(stages, starts, self.ends):
            self.tokens_before.append(self.tokens_before[-1] + (end - start) * stage.tokens_per_step)

    def stage_of(self, step: int) -> int:
        """Return the number of the stage of a step counted from 0."""
        return min(bisect.bisect_right(self.ends, step), len(self.stages) - 1)

    def rows(self, step: int) -> Rows:
        """Return the rows of a step counted from 0."""
        index = self.stage_of(step)
        stage = self.stages[index]
        start = self.ends[index - 1] if index else 0
        before = -(-self.tokens_before[index] // stage.seq_len)
        return Rows(before + (step - start) * stage.sequences_per_step, stage.sequences_per_step, stage.seq_len)

    def tokens(self, step: int) -> int:
        """Return the tokens of all steps before `step`."""
        index = self.stage_of(step)
        start = self.ends[index - 1] if index else 0
        return self.tokens_before[index] + (step - start) * self.stages[index].tokens_per_step
