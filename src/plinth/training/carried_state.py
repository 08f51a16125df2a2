"""The state of recurrent layers that a training carries from each step to the next (truncated backpropagation through time)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plinth.ops.recurrent import State


class CarriedState:
    """The state of each row of the batch behind the last step and behind the one before; part of a checkpoint.

    It keeps two generations, so that a step that is looked at again (to find the row of a loss that spikes) reads what it read first.
    Held in fp32, which bf16 states pass through unchanged. Worker threads write different rows.
    """

    def __init__(self, layers: Sequence[State]):
        """`layers` are the zero states of each layer for all rows of a step."""
        self._counts = [len(state) for state in layers]
        self._before = [part.detach().float().clone() for state in layers for part in state]
        self._after = [torch.zeros_like(part) for part in self._before]
        self._step = -1

    def begin(self, step: int, fresh_R: torch.Tensor) -> None:
        """Go to a step, counted from 0: what the last one left is what this one reads, and zero in fresh rows."""
        if step != self._step:
            self._before, self._after, self._step = self._after, self._before, step
        for part in self._before:
            part[fresh_R.to(part.device)] = 0.0

    def read(self, rows_B: torch.Tensor, dtype: torch.dtype) -> list[State]:
        """Return the states of each layer that some rows begin with."""
        self._move(rows_B.device)
        parts = iter(self._before)
        return [tuple(next(parts)[rows_B].to(dtype) for _ in range(count)) for count in self._counts]

    def write(self, rows_B: torch.Tensor, layers: Sequence[State]) -> None:
        """Take over the states that some rows end with; no gradient goes through them."""
        for part, new in zip(self._after, (new for state in layers for new in state)):
            part[rows_B] = new.detach().to(part.dtype)

    def _move(self, device: torch.device) -> None:
        if self._before[0].device != device:
            self._before = [part.to(device) for part in self._before]
            self._after = [part.to(device) for part in self._after]

    def state_dict(self) -> dict[str, Any]:
        """Return what the last step left, and its number."""
        return {"step": self._step, **{f"after_{i}": part for i, part in enumerate(self._after)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._step = int(state["step"])
        for i, part in enumerate(self._after):
            part.copy_(state[f"after_{i}"])
