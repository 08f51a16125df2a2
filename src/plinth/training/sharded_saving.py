"""When ranks save together: what `saving.Checkpointer` does for one process, for weights that are spread over many.

The leader decides when; each rank copies its shards, and a thread of each rank writes them while training goes on. What these
threads tell each other goes over a process group of their own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from plinth.config import UserError, read_json, save_json
from plinth.run import Run, file_sha256, publish_dir
from plinth.training.checkpoint import (
    FORMAT,
    RECORD_FILE,
    SEAL_FILE,
    STATE_FILE,
    Position,
    Snapshot,
    TrainingState,
    check_same_data,
)
from plinth.training.parallel import Ranks
from plinth.training.saving import DATA_FILE, GOES_ON, SavePolicy, describe_failure, prune
from plinth.training.sharded_checkpoint import (
    METADATA_FILE,
    distributed_tensors,
    is_sharded,
    read_blocks,
    read_blocks_of_plain,
    stored_shapes,
    writer,
)
from plinth.training.sharded_weights import ShardedWeights


class ShardedCheckpointer:
    """Saves and restores one run's state on all ranks; at most one save is being written at a time.

    All ranks call the same methods at the same steps. The checkpoints lie in the leader's run directory, which every rank must see.
    """

    def __init__(self, run: Run, state: TrainingState, policy: SavePolicy, warn: Callable[[str], None]):
        self.run, self.state, self.policy, self.warn = run, state, policy, warn
        self.masters: ShardedWeights = state.masters  # type: ignore[assignment]
        self.ranks: Ranks = self.masters.ranks
        self._snapshot = Snapshot()
        self._group = dist.new_group(backend="gloo")
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._failed_step = 0
        self._last_try = time.monotonic()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardedCheckpointer:
        if self.ranks.is_leader:
            self._stack.enter_context(self.run.lock())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait()
            self._tell_failure("No further step follows.")
        finally:
            self._stack.close()

    def begin(self) -> Position:
        """Write down what data a new run is trained on."""
        if self.state.data and self.ranks.is_leader:
            self.run.checkpoints_dir.mkdir(exist_ok=True)
            save_json(self.run.checkpoints_dir / DATA_FILE, self.state.data)
        return Position()

    def resume(self) -> Position:
        """Load the newest sound checkpoint, whatever number of ranks wrote it, and cut the metrics to its step.

        Raises UserError when the data are others than the run began with, or when no checkpoint is sound.
        """
        paths = []
        if self.ranks.is_leader:
            self.run.remove_unfinished()
            data_file = self.run.checkpoints_dir / DATA_FILE
            if data_file.exists():
                check_same_data(read_json(data_file), self.state.data, str(self.run.path))
            else:
                self.begin()
            paths = [path for _, path in self.run.checkpoints()]
        problems = []
        for path in reversed(self.ranks.tell(paths)):
            if problem := self._problem_with(path):
                problems.append(problem)
                continue
            position = self._load(path)
            if problems:
                self.warn(f"{' '.join(problems)} Falling back to step {position.step}.")
            if self.ranks.is_leader:
                self.run.truncate_metrics(position.step)
            self._share_metrics()
            return position
        if problems:
            raise UserError(f"no sound checkpoint is left. {' '.join(problems)} Start anew with another --out.")
        return Position()

    def _share_metrics(self) -> None:
        """Give every rank the leader's lines of metrics: what they decide by them must be alike."""
        file = self.run.path / "metrics.jsonl"
        text = self.ranks.tell(file.read_text(encoding="utf-8") if self.ranks.is_leader and file.exists() else "")
        if not self.ranks.is_leader:
            file.write_text(text, encoding="utf-8")

    def after_step(self, position: Position, last: bool = False) -> None:
        """Take a checkpoint if one is due; one that is to be kept for good waits for the one being written."""
        late = self.ranks.is_leader and time.monotonic() - self._last_try > self.policy.every_s
        due, writing = self.ranks.any(late, self._is_writing())
        if not writing:
            self._tell_failure(GOES_ON.format(self.policy.every_s))
        if self.policy.keeps_for_good(position.step) or (due and not writing and not last):
            self._save(position)

    def save_now(self, position: Position) -> None:
        """Save and return when the checkpoint is published. Raises UserError when the system refuses."""
        self._wait()
        saved = self.ranks.tell(self.run.last_step == position.step)
        if not saved:
            self._save(position)
        self._wait()
        if self._failure is not None:
            text, self._failure = describe_failure(self.run, self._failure, position.step), None
            raise UserError(f"stopped after step {position.step}, but {text} Mend that and continue with --resume.")

    def _save(self, position: Position) -> None:
        self._wait()
        self._tell_failure(GOES_ON.format(self.policy.every_s))
        self._last_try = time.monotonic()
        with contextlib.suppress(OSError):  # lines that a full disk refuses stay in memory
            self.run.flush_metrics()
        self._snapshot.take(self.state, position)
        self._writer = threading.Thread(target=self._write, args=(position.step,), name=f"checkpoint {position.step}")
        self._writer.start()
        if not self.policy.background:
            self._wait()

    def _write(self, step: int) -> None:
        try:
            self._lead(step) if self.ranks.is_leader else self._follow()
        except BaseException as error:  # told or raised in the training thread
            self._failure, self._failed_step = error, step

    def _lead(self, step: int) -> None:
        """Make the folder, write beside the others, seal it, and publish it; tell the others how it went."""
        followers_wait = True
        try:
            self.run.sync_metrics()
            with publish_dir(self.run.checkpoint_path(step)) as folder:
                self._tell(folder)
                followers_wait = False
                digests = self._write_blocks(folder)
                followers_wait = True
                save_json(folder / RECORD_FILE, self._snapshot.record)
                digests |= {name: file_sha256(folder / name) for name in (METADATA_FILE, RECORD_FILE)}
                save_json(folder / SEAL_FILE, {"format": FORMAT, "sha256": digests})
            prune(self.run, self.policy)
        except BaseException as error:
            if followers_wait:
                self._tell(_portable(error))
            raise
        self._tell(None)

    def _follow(self) -> None:
        folder = self._hear()
        self._write_blocks(folder)
        self._hear()

    def _write_blocks(self, folder: Path) -> dict[str, str]:
        """Write this rank's blocks; return the hashes of all ranks' files. An error on one rank is raised on all."""
        tensors = distributed_tensors(self.masters, self._snapshot.tensors)
        try:
            dcp.save(tensors, storage_writer=writer(folder), process_group=self._group)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        mine = {file.name: file_sha256(file) for file in folder.glob(f"__{self.ranks.rank}_*")}
        everyone: list[dict[str, str]] = [{}] * self.ranks.world_size
        dist.all_gather_object(everyone, mine, group=self._group)
        return {name: digest for part in everyone for name, digest in part.items()}

    def _tell(self, value: Any) -> None:
        dist.broadcast_object_list([value], src=0, group=self._group)

    def _hear(self) -> Any:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    def _problem_with(self, path: Path) -> str | None:
        """Compare the hashes of a checkpoint's files, each rank those of some; return what is wrong, alike on all ranks."""
        problem = None
        try:
            digests = read_json(path / SEAL_FILE)["sha256"]
            for name in sorted(digests)[self.ranks.rank :: self.ranks.world_size]:
                if not (path / name).exists() or file_sha256(path / name) != digests[name]:
                    problem = f"{path / name} is damaged: its SHA-256 differs from the one written beside it."
        except (UserError, OSError, KeyError, TypeError) as error:
            problem = f"{path} is damaged: {error}"
        return next((found for found in self.ranks.gather(problem) if found), None)

    def _load(self, path: Path) -> Position:
        record = read_json(path / RECORD_FILE)
        check_same_data(record["data"], self.state.data, str(path))
        shards = self.state.tensors()
        if is_sharded(path):
            self._check_shapes(path, shards)
            read_blocks(path, self.masters, shards)
        else:
            read_blocks_of_plain(path / STATE_FILE, self.masters, shards)
        return self.state.load_rest(record, shards)

    def _check_shapes(self, path: Path, shards: dict[str, Any]) -> None:
        stored = stored_shapes(path)
        for key in shards:
            name = key.rpartition("/")[2]
            if name in self.masters.shapes and stored.get(key) != self.masters.shapes[name]:
                raise UserError(
                    f"{path} is of another model or optimizer: {key} is {tuple(stored.get(key, ())) or 'absent'} there and "
                    f"{tuple(self.masters.shapes[name])} here. Restore the run's config.json, or start anew with another --out."
                )

    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _tell_failure(self, rest: str) -> None:
        if self._failure is not None and not self._is_writing():
            error, self._failure = self._failure, None
            self.warn(f"{describe_failure(self.run, error, self._failed_step)} {rest}")


def _portable(error: BaseException) -> BaseException:
    """Return an error that can be sent to the other ranks."""
    return error if isinstance(error, OSError) else RuntimeError(f"the leader could not publish the checkpoint: {error!r}")
