"""Learning-rate schedules: functions from the step to a factor of the peak rate."""

from __future__ import annotations

import math


def warmup_stable_decay(step: int, *, steps: int, warmup_steps: int, decay_steps: int, floor: float = 0.0) -> float:
    """Rise linearly over `warmup_steps`, stay at 1, fall as 1 - sqrt over the last `decay_steps` to `floor`.

    `step` counts from 0.  Source: Hägele et al. 2024, arXiv:2405.18392 (the 1 - sqrt cooldown).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decayed = step - (steps - decay_steps)
    if decayed < 0:
        return 1.0
    return floor + (1.0 - floor) * (1.0 - math.sqrt((decayed + 1) / (decay_steps + 1)))
