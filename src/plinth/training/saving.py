"""When a checkpoint is taken, which are kept, and a background thread that writes them while training goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError, read_json, save_json
from plinth.run import Run, publish_dir
from plinth.training.checkpoint import (
    Position,
    Snapshot,
    TrainingState,
    check_same_data,
    load_checkpoint,
    write_checkpoint,
)

DATA_FILE = "data.json"
GOES_ON = "Training goes on; the next attempt is in {:.0f} s."


@dataclass(frozen=True)
class SavePolicy:
    """When checkpoints are taken and which stay."""

    every_s: float = 60.0
    """seconds between checkpoints"""
    keep: int = 2
    """newest ones kept"""
    keep_every_steps: int | None = None
    """a checkpoint at each multiple of so many steps is taken and kept for good"""
    keep_steps: frozenset[int] = frozenset()
    """single steps whose checkpoint is taken and kept for good"""
    background: bool = True
    """write in a thread of its own while training goes on"""

    def keeps_for_good(self, step: int) -> bool:
        """Return whether the checkpoint of a step is never removed."""
        return step in self.keep_steps or (self.keep_every_steps is not None and step % self.keep_every_steps == 0)


class Checkpointer:
    """Saves and restores one run's state; at most one save is being written at a time.

    A save that the system refuses (a full disk) is told through `warn` and tried again at the next interval; training goes on,
    and what was published before stays untouched. While open, it holds the run's lock.
    """

    def __init__(self, run: Run, state: TrainingState, policy: SavePolicy, warn: Callable[[str], None]):
        self.run, self.state, self.policy, self.warn = run, state, policy, warn
        self._snapshot = Snapshot()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last_try = time.monotonic()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Checkpointer:
        self._stack.enter_context(self.run.lock())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait(told="No further step follows.")
        finally:
            self._stack.close()

    def begin(self) -> Position:
        """Write down what data a new run is trained on."""
        if self.state.data:
            self.run.checkpoints_dir.mkdir(exist_ok=True)
            save_json(self.run.checkpoints_dir / DATA_FILE, self.state.data)
        return Position()

    def resume(self) -> Position:
        """Clear away what a crash left half done, load the newest sound checkpoint, and cut the metrics to its step.

        Raises UserError when the data are others than the run began with, or when no checkpoint is sound.
        """
        self.run.remove_unfinished()
        data_file = self.run.checkpoints_dir / DATA_FILE
        if data_file.exists():
            check_same_data(read_json(data_file), self.state.data, str(self.run.path))
        position, warnings = load_checkpoint(self.run, self.state)
        if not data_file.exists():
            self.begin()
        if missing := self.run.truncate_metrics(position.step):
            warnings.append(f"{self.run.path}/metrics.jsonl has lost {missing} of the {position.step} steps before the checkpoint.")
        for warning in warnings:
            self.warn(warning)
        return position

    def after_step(self, position: Position, last: bool = False) -> None:
        """Take a checkpoint if one is due; one that is to be kept for good waits for the one being written.

        After the last step only one to be kept is taken: what follows is the model itself.
        """
        self._tell_failure()
        if self.policy.keeps_for_good(position.step):
            self._save(position)
        elif not last and time.monotonic() - self._last_try > self.policy.every_s and not self._is_writing():
            self._save(position)

    def save_now(self, position: Position) -> None:
        """Save and return when the checkpoint is published. Raises UserError when the system refuses."""
        self._wait(told=None)
        if self.run.last_step != position.step:
            self._failure = None
            self._save(position)
            self._wait(told=None)
        if self._failure is not None:
            text, self._failure = describe_failure(self.run, self._failure, position.step), None
            raise UserError(f"stopped after step {position.step}, but {text} Mend that and continue with --resume.")

    def _save(self, position: Position) -> None:
        self._wait()
        self._last_try = time.monotonic()
        try:
            self.run.flush_metrics()
        except OSError as error:
            self._fail(error, position.step)
            return
        self._snapshot.take(self.state, position)
        if self.policy.background:
            self._writer = threading.Thread(target=self._write_behind, args=(position.step,), name=f"checkpoint {position.step}")
            self._writer.start()
        else:
            self._write(position.step)

    def _write_behind(self, step: int) -> None:
        if sys.platform == "linux":  # there a priority belongs to a thread; training goes first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        self._write(step)

    def _write(self, step: int) -> None:
        try:
            self.run.sync_metrics()  # a checkpoint on the disk means that the metrics up to it are there too
            with publish_dir(self.run.checkpoint_path(step)) as folder:
                write_checkpoint(folder, self._snapshot)
            prune(self.run, self.policy)
        except BaseException as error:  # told or raised in the training thread
            self._fail(error, step)

    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _wait(self, told: str | None = GOES_ON) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if told is not None:
            self._tell_failure(told)

    def _fail(self, error: BaseException, step: int) -> None:
        self._failure, self._failed_step = error, step

    def _tell_failure(self, rest: str = GOES_ON) -> None:
        if self._failure is None or self._is_writing():
            return
        error, self._failure = self._failure, None
        self.warn(f"{describe_failure(self.run, error, self._failed_step)} {rest.format(self.policy.every_s)}")


def prune(run: Run, policy: SavePolicy) -> None:
    """Remove the checkpoints that the policy no longer keeps."""
    passing = [path for step, path in run.checkpoints() if not policy.keeps_for_good(step)]
    for path in passing[: max(0, len(passing) - policy.keep)]:
        gone = path.with_name(f".{path.name}.old.{os.getpid():08d}")  # a half-removed one must not look like one
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def describe_failure(run: Run, error: BaseException, step: int) -> str:
    """Return one line about a refused write; anything but the system's refusal is our own mistake and is raised."""
    if not isinstance(error, OSError):
        raise error
    place = f"{error.filename}: " if error.filename else ""
    newest = run.last_step
    rest = f"the newest whole one is of step {newest}." if newest else "there is no earlier one."
    return f"the checkpoint of step {step} was not written ({place}{error.strerror or error}); {rest}"


def open_checkpointer(run: Run, state: TrainingState, policy: SavePolicy, warn: Callable[[str], None]) -> Any:
    """Return what saves and restores a run: for one process a `Checkpointer`, for ranks what does the same together."""
    if state.masters.ranks is None:
        return Checkpointer(run, state, policy, warn)
    from plinth.training.sharded_saving import ShardedCheckpointer  # torch.distributed.checkpoint takes half a second to import

    return ShardedCheckpointer(run, state, policy, warn)
