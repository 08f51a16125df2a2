"""Checkpoints: the whole state of training in one folder, hashed, and checked on the way back.

Only global quantities are stored: the step is the loader's cursor, because batches are a function of (seed, step), and no entry
belongs to a rank or a thread. So a run may be resumed on another number of ranks; see docs/checkpoints.md.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from plinth.config import UserError, read_json, save_json
from plinth.models.tensor_file import save_tensors
from plinth.run import Run, describe_hardware, file_sha256, installed_versions
from plinth.training.optim import Optimizer
from plinth.training.precision import MasterWeights

FORMAT = 2
MANY_RANKS_FILE = ".metadata"  # in a checkpoint that several ranks wrote (sharded_checkpoint.py)
STATE_FILE, RECORD_FILE, SEAL_FILE = "state.safetensors", "state.json", "sha256.json"


class Stateful(Protocol):
    """Anything beside model and optimizer that changes while training and must come back at a resume."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain JSON values by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Position:
    """How far training has come."""

    step: int = 0
    """updates done"""
    tokens: int = 0
    """counted tokens, over all ranks"""
    time_s: float = 0.0
    """seconds of training, over all resumes"""


class TrainingState:
    """Everything that a resumed run needs, as tensors and plain values by name."""

    def __init__(
        self,
        masters: MasterWeights,
        optimizer: Optimizer,
        *,
        data: Mapping[str, Any] | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
        extra: Mapping[str, Stateful] | None = None,
    ):
        """`data` describes what the batches come from (plain values); a resume with another description is refused.

        `generators` are those that the caller draws from, `extra` the further parts with state of their own.
        """
        self.masters, self.optimizer = masters, optimizer
        self.data = json.loads(json.dumps(dict(data or {})))  # as it will be read back: tuples become lists
        self.generators, self.extra = dict(generators or {}), dict(extra or {})
        self.made_on = made_on()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the state by name; the weights and the optimizer's are the live ones, no copies."""
        tensors = {f"weight/{name}": tensor for name, tensor in self.masters.tensors.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.state.items()}
        tensors |= {f"generator/{name}": state for name, state in self._generator_states().items()}
        for part, stateful in self.extra.items():
            tensors |= {f"extra/{part}/{name}": value for name, value in stateful.state_dict().items() if isinstance(value, torch.Tensor)}
        return tensors

    def record(self, position: Position) -> dict[str, Any]:
        """Return the plain values of the state."""
        extra = {
            part: {name: value for name, value in stateful.state_dict().items() if not isinstance(value, torch.Tensor)}
            for part, stateful in self.extra.items()
        }
        return {
            "format": FORMAT,
            **asdict(position),
            "num_updates": self.optimizer.num_updates,
            "data": self.data,
            "generators": {"python": random.getstate(), "numpy": _numpy_state()},
            "extra": extra,
            "made_on": self.made_on,
        }

    def load(self, record: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> Position:
        """Take over a saved state. Raises UserError, before anything is changed, when it belongs to other data or another model."""
        check_same_data(record["data"], self.data, where)
        self._check_parts(record, tensors, where)
        self.masters.load(_below(tensors, "weight/"))
        self.optimizer.load(_below(tensors, "optimizer/"), record["num_updates"])
        return self.load_rest(record, tensors)

    def load_rest(self, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Position:
        """Take over all but the weights' and the optimizer's tensors, which several ranks read each for itself."""
        self.optimizer.num_updates = record["num_updates"]
        self._load_generators(_below(tensors, "generator/"), record["generators"])
        for part, stateful in self.extra.items():
            stateful.load_state_dict({**_below(tensors, f"extra/{part}/"), **record["extra"][part]})
        return Position(record["step"], record["tokens"], record["time_s"])

    def _check_parts(self, record: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> None:
        expected, found = (
            {name: tuple(tensor.shape) for name, tensor in side.items() if name.startswith(("weight/", "optimizer/"))}
            for side in (self.tensors(), tensors)
        )
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if differing:
            name = differing[0]
            raise UserError(
                f"{where} is of another model or optimizer: {name} is {found.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} here. Restore the run's config.json, or start anew with another --out."
            )
        if changed := sorted(record["extra"].keys() ^ self.extra.keys()):
            raise UserError(
                f"{where} and this run do not both have the part {changed[0]}, which has a state of its own. "
                "Resume with the options that the run began with."
            )

    def _generator_states(self) -> dict[str, torch.Tensor]:
        states = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return states | {f"given/{name}": generator.get_state() for name, generator in self.generators.items()}

    def _load_generators(self, states: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        torch.set_rng_state(states["torch"])
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            if f"cuda/{i}" in states:  # another number of devices than before keeps what it has
                torch.cuda.set_rng_state(states[f"cuda/{i}"], i)
        for name, generator in self.generators.items():
            generator.set_state(states[f"given/{name}"])
        version, numbers, gauss = plain["python"]
        random.setstate((version, tuple(numbers), gauss))
        numbers = plain["numpy"]["state"]
        np.random.set_state({**plain["numpy"], "state": {**numbers, "key": np.array(numbers["key"], dtype=np.uint32)}})


class Snapshot:
    """A copy of the state in memory that stays as it is while training goes on; its buffers serve again at the next save."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.record: dict[str, Any] = {}

    @torch.no_grad()
    def take(self, state: TrainingState, position: Position) -> None:
        """Copy the state as it is now."""
        live = state.tensors()
        self.tensors = {name: self._buffer(name, tensor) for name, tensor in live.items()}
        torch._foreach_copy_(list(self.tensors.values()), list(live.values()), non_blocking=True)
        if any(tensor.is_cuda for tensor in live.values()):
            torch.cuda.synchronize()
        self.record = state.record(position)

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        old = self.tensors.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot's files into `folder`, and last their hashes."""
    save_tensors(snapshot.tensors, folder / STATE_FILE)
    save_json(folder / RECORD_FILE, snapshot.record)
    seal(folder)


def seal(folder: Path) -> None:
    """Write the SHA-256 of each file of a folder beside them."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != SEAL_FILE]
    digests = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    save_json(folder / SEAL_FILE, {"format": FORMAT, "sha256": digests})


def check_sealed(folder: Path) -> None:
    """Raise UserError unless each file of a checkpoint is there with the bytes that were written."""
    try:
        written = read_json(folder / SEAL_FILE)
        for name, digest in written["sha256"].items():
            if not (folder / name).exists() or file_sha256(folder / name) != digest:
                raise UserError(f"{folder / name} is damaged: its SHA-256 differs from the one written beside it.")
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder} is damaged: {SEAL_FILE} or a file it names cannot be read ({error!r}).") from None
    if written.get("format") != FORMAT:
        raise UserError(f"{folder} has format {written.get('format')}; this version of Plinth reads format {FORMAT}.")


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the plain values and the tensors of one checkpoint. Raises UserError when a byte differs or a file is cut off."""
    check_sealed(path)
    if (path / MANY_RANKS_FILE).exists():
        from plinth.training.sharded_checkpoint import read_whole  # torch.distributed.checkpoint takes half a second to import

        return read_json(path / RECORD_FILE), read_whole(path)
    try:
        return read_json(path / RECORD_FILE), load_file(path / STATE_FILE)
    except SafetensorError as error:
        raise UserError(f"{path / STATE_FILE} cannot be read: {error}.") from None


def list_checkpoints(run: Run) -> list[Path]:
    """Return the published checkpoints, oldest first; unfinished and damaged ones carry another name."""
    return [path for _, path in run.checkpoints()]


def load_checkpoint(run: Run, state: TrainingState) -> tuple[Position, list[str]]:
    """Load the newest sound checkpoint; return its position (step 0 when there is none) and warnings.

    Damaged ones found on the way are renamed to damaged_step_N, so that they neither count nor are met again.
    Raises UserError when checkpoints exist and none of them is sound.
    """
    damaged: list[tuple[Path, UserError]] = []
    for path in reversed(list_checkpoints(run)):
        try:
            record, tensors = read_checkpoint(path)
        except UserError as error:
            damaged.append((path, error))
            continue
        position = state.load(record, tensors, str(path))
        warnings = [f"{error} {_set_aside(path)} Falling back to step {position.step}." for path, error in damaged]
        return position, warnings + _other_machine(record["made_on"], path)
    if damaged:
        reasons = " ".join(str(error) for _, error in damaged)
        raise UserError(f"no sound checkpoint is left. {reasons} Start anew with another --out.")
    return Position(), []


def check_same_data(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise UserError that names the first entry in which two descriptions of the data differ."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{key}={now.get(key)!r} differs from {before.get(key)!r}, with which {where} was trained. "
                "Resume with the same data, or start anew with another --out."
            )


def made_on() -> dict[str, str]:
    """Return what the last bits of a result depend on."""
    versions = installed_versions()
    return {"cpu": describe_hardware()["cpu"], "torch": versions["torch"], "numpy": versions["numpy"]}


def _other_machine(before: dict[str, str], path: Path) -> list[str]:
    now = made_on()
    changed = "; ".join(f"{key} {before.get(key)} is {now[key]} now" for key in now if before.get(key) != now[key])
    return [f"{path.name} was made elsewhere ({changed}): last bits may differ from an uninterrupted run."] if changed else []


def _set_aside(path: Path) -> str:
    aside = path.with_name(f"damaged_{path.name}")
    number = 2
    while aside.exists():
        aside = path.with_name(f"damaged_{path.name}_{number}")
        number += 1
    path.rename(aside)
    return f"Set aside as {aside.name}."


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _numpy_state() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    return {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}
