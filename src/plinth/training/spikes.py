"""Spikes and non-finite values: found before the update, traced to rows of the batch, and warned of, skipped, or stopped at."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from plinth.config import UserError
from plinth.training.config import LEAST_WINDOW, SpikeConfig
from plinth.training.device import move_batch
from plinth.training.precision import MasterWeights
from plinth.training.step import Batch, LossFunction, StepResult

MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_LOSS_SIGMA = 0.02  # nats, and share of the median: a loss that hardly varies is not made sensitive by that
LEAST_NORM_SIGMA = 0.08  # of the norm's logarithm
SUSPECTS = 3

DescribeBatch = Callable[[int, Sequence[int] | None], str]
"""(step counted from 0, rows of its batch or None for all) -> the documents that they hold, for people."""


@dataclass(frozen=True)
class Incident:
    """One update that looked wrong."""

    step: int
    """the update's number, counted from 1"""
    event: Literal["spike", "non-finite"]
    action: Literal["warn", "skip", "stop"]
    reason: str
    """which value, against what"""
    rows: tuple[int, ...]
    """rows of the step's batch that stand out, the worst first; empty when rows could not be told apart"""
    documents: str
    """what those rows hold"""

    @property
    def fields(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of it."""
        return {"event": self.event, "action": self.action, "reason": self.reason, "rows": list(self.rows), "documents": self.documents}

    def __str__(self) -> str:
        return f"{self.reason} Batch: {self.documents}."


class BadBatchError(UserError):
    """Training stopped before an update that looked wrong; the weights are those of the update before."""

    def __init__(self, message: str, incident: Incident):
        super().__init__(message)
        self.incident = incident


class SpikeGuard:
    """Judges each update before it is made, from the losses and gradient norms of the updates before.

    A value is a spike when it lies `threshold` robust standard deviations (1.4826 times the median absolute deviation) above the
    median of the last `window` updates; norms are compared by their logarithm, since they vary by factors. Judgement depends on
    logged values alone, so a resumed run judges like one that was never stopped. An update without a gradient, as of a roll-out
    whose rewards are all equal, is no measure for others. `trace(step, measure)` names the rows that
    stand out and their documents; `measure` is "loss" or "grad_norm".
    """

    def __init__(
        self, config: SpikeConfig, trace: Callable[[int, str], tuple[tuple[int, ...], str]], *, advice: str, warn: Callable[[str], None]
    ):
        self.config, self._trace, self._advice, self._warn = config, trace, advice, warn
        self._losses: deque[float] = deque(maxlen=config.window)
        self._log_norms: deque[float] = deque(maxlen=config.window)
        self._skips = 0
        self.incident: Incident | None = None

    def restore(self, records: Sequence[dict[str, Any]]) -> None:
        """Take over the window from the lines of metrics.jsonl up to the step that training goes on from."""
        made = [record for record in records if "step" in record and not record.get("skipped") and record["grad_norm"]]
        for record in made[-self.config.window :]:
            self._remember(record["loss_nats"], record["grad_norm"])
        for record in reversed(records):
            if not record.get("skipped"):
                break
            self._skips += 1

    def allows(self, step: int, result: StepResult) -> bool:
        """Return whether update `step` (counted from 0) may be made; `incident` then says what was wrong, or is None.

        Raises BadBatchError when it is to stop, or when too many updates in a row were left out.
        """
        found = self._find(result)
        if found is None:
            self.incident, self._skips = None, 0
            self._remember(result.loss_nats, result.grad_norm)
            return True
        event, measure, reason = found
        action = self.config.on_nonfinite if event == "non-finite" else self.config.on_spike
        self._skips = self._skips + 1 if action == "skip" else 0
        if self._skips > self.config.max_skips:
            action, reason = "stop", f"{reason} {self.config.max_skips} updates in a row were left out before it."
        self.incident = Incident(step + 1, event, action, reason, *self._trace(step, measure))
        if action == "stop":
            raise BadBatchError(f"stopped before update {step + 1}: {self.incident} {self._advice}", self.incident)
        self._warn(f"update {step + 1}{' left out' if action == 'skip' else ''}: {self.incident}")
        if action == "warn":
            self._remember(result.loss_nats, result.grad_norm)
        return action == "warn"

    def _find(self, result: StepResult) -> tuple[Literal["spike", "non-finite"], str, str] | None:
        """Return (event, measure at fault, reason), or None when all is usual."""
        loss, norm = result.loss_nats, result.grad_norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return (
                "non-finite",
                "loss" if not math.isfinite(loss) else "grad_norm",
                f"loss {loss} and gradient norm {norm} are not both finite.",
            )
        count = len(self._losses)
        if count < LEAST_WINDOW:
            return None
        centre, spread = median_and_sigma(self._losses)
        sigma = max(spread, LEAST_LOSS_SIGMA * max(1.0, abs(centre)))
        if loss > centre + self.config.threshold * sigma:
            return "spike", "loss", f"loss {loss:.4g} after a median of {centre:.4g} over {count} updates."
        centre, spread = median_and_sigma(self._log_norms)
        if _log(norm) > centre + self.config.threshold * max(spread, LEAST_NORM_SIGMA):
            return (
                "spike",
                "grad_norm",
                f"gradient norm {norm:.4g} after a median of {math.exp(centre):.4g} over {count} updates.",
            )
        return None

    def _remember(self, loss: float, norm: float) -> None:
        if norm == 0:
            return
        self._losses.append(loss)
        self._log_norms.append(_log(norm))


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def median_and_sigma(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the standard deviation that the median absolute deviation stands for."""
    centre = statistics.median(values)
    return centre, MAD_TO_SIGMA * statistics.median(abs(value - centre) for value in values)


def trace_rows(masters: MasterWeights, loss_function: LossFunction, batches: Sequence[Batch], measure: str) -> tuple[int, ...]:
    """Return the rows of a step's batch that stand out by "loss" or "grad_norm", the worst first, at most SUSPECTS.

    Each row is run alone with the weights as they are; rows are numbered through the micro-batches. Non-finite rows come first, and
    when there are some, only they are returned. Empty when a micro-batch is not made of tensors with a row each, and in a run of
    several processes, where one row alone cannot be run on weights that are spread over all.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return ()
    measured: list[tuple[float, int]] = []
    for batch in batches:
        if not _has_rows(batch):
            return ()
        for i in range(len(batch[0])):
            value = _measure_row(masters, loss_function, tuple(part[i : i + 1] for part in batch), measure)
            measured.append((value, len(measured)))
    broken = [row for value, row in measured if not math.isfinite(value)]
    return tuple((broken or [row for _, row in sorted(measured, reverse=True)])[:SUSPECTS])


def _has_rows(batch: Batch) -> bool:
    if not isinstance(batch, (tuple, list)) or not batch:
        return False
    return all(isinstance(part, torch.Tensor) and part.dim() and len(part) == len(batch[0]) for part in batch)


def _measure_row(masters: MasterWeights, loss_function: LossFunction, row: Batch, measure: str) -> float:
    """Return a row's mean loss, or the norm of that loss's gradient; 0 for a row that counts nothing."""
    loss, count, _ = loss_function(masters.model, move_batch(row, masters.device))
    count = float(count)
    if not count:
        return 0.0
    if measure == "loss":
        return float(loss.detach()) / count
    grads = [grad for grad in torch.autograd.grad(loss, masters.parameters, allow_unused=True) if grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad.float()) for grad in grads]))) / count
