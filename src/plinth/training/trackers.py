"""Where metrics also go: TensorBoard and Weights & Biases, each an extra; what fails in them never stops training."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from plinth.config import UserError
from plinth.run import Run


class Tracker(Protocol):
    """Takes the numbers of each step."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder tensorboard/; a resumed run hides what was logged after the step it goes on from."""

    def __init__(self, run: Run, first_step: int, warn: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step if first_step > 1 else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named after the run's folder; its files lie in the run's folder wandb/, its project is WANDB_PROJECT or plinth."""

    def __init__(self, run: Run, first_step: int, warn: Callable[[str], None]):
        import wandb

        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "plinth"),
            "name": run.path.resolve().name,
            "id": hashlib.sha256(json.dumps(run.provenance, sort_keys=True).encode()).hexdigest()[:16],
            "resume": "allow",
            "dir": str(run.path),
            "config": run.config,
        }
        settings = wandb.Settings(init_timeout=30.0, console="off", silent=True)
        try:
            self._run = wandb.init(**options, settings=settings)
        except wandb.errors.UsageError as error:
            raise UserError(f"wandb: {error} Run `wandb login`, or set WANDB_MODE=offline to log without an account.") from None
        except (wandb.errors.Error, OSError) as error:
            warn(f"wandb: {error} Logging offline; `wandb sync {run.path}/wandb/offline-*` uploads it later.")
            self._run = wandb.init(**options, mode="offline", settings=settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Run, int, Callable[[str], None]], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is unknown or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers={name!r} is not one of {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers names {name}, but its package is not installed. Install it with pip install 'plinth-fm[trackers]', "
                f"or leave {name} out; metrics.jsonl is written in any case."
            )


class Trackers:
    """The trackers of one run; one that fails is told of once and left alone."""

    def __init__(self, names: Sequence[str], run: Run, first_step: int, warn: Callable[[str], None]):
        check_trackers(names)
        self._warn = warn
        self._open = {name: TRACKERS[name](run, first_step, warn) for name in names}

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Hand on the numbers among `values`."""
        if not self._open:
            return
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(step, numbers)
            except Exception as error:  # whatever a service and its client raise: metrics.jsonl has the line
                del self._open[name]
                self._warn(f"{name} failed at step {step} and gets nothing more: {error}. metrics.jsonl has every step.")

    def close(self) -> None:
        for tracker in self._open.values():
            with contextlib.suppress(Exception):
                tracker.close()
        self._open = {}
