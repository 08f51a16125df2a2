"""A teacher's file while it is being written, a micro-batch at a time, so that the work of a process that was killed goes on.

The arrays have their whole size from the beginning. Beside them lies progress.jsonl: what the file is made of, then a line for each
micro-batch that is in the arrays, with a checksum of its rows. Only what its checksum confirms is taken as whole; all else is computed
again, so neither a line that was cut off nor rows that never came to the disk can do harm.
"""

from __future__ import annotations

import contextlib
import json
import threading
import tokenize
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plinth.config import UserError, read_json, write_atomic
from plinth.run import publish_dir

MANIFEST = "teacher.json"
PROGRESS = "progress.jsonl"
VERSION = 1
Shapes = dict[str, tuple[tuple[int, ...], type]]


def is_teacher_file(path: Path) -> bool:
    """Return whether a path is a teacher's file. Raises UserError where it is not all written."""
    if (Path(path) / PROGRESS).is_file() and not (Path(path) / MANIFEST).is_file():
        raise UserError(f"{path} is an unfinished teacher's file. Finish it: the same `plinth distill score` with --resume.")
    return (Path(path) / MANIFEST).is_file()


def check_free(out: Path) -> None:
    """Raise UserError when there is something at `out`."""
    if (out / PROGRESS).is_file() and not (out / MANIFEST).is_file():
        raise UserError(f"{out} holds an unfinished teacher's file. Pass --resume to go on with it, or --out with a new name.")
    if out.exists():
        raise UserError(f"{out} exists already. Remove it, or pass another --out.")


def begin_parts(out: Path, made_of: dict[str, Any]) -> None:
    """Make the folder `out`, by one rename, with nothing in it but what the file is made of and, as `config`, how."""
    with publish_dir(out) as folder:
        write_atomic(folder / PROGRESS, json.dumps({"version": VERSION, **made_of}) + "\n")


def read_begun(out: Path) -> dict[str, Any]:
    """Return what the file in `out` is made of, whole or unfinished. Raises UserError where there is none, or it cannot be read."""
    if (out / MANIFEST).is_file():
        (out / PROGRESS).unlink(missing_ok=True)  # of a process that was killed between the two
        return read_json(out / MANIFEST)
    path = out / PROGRESS
    if not path.is_file():
        raise UserError(f"{out} holds no teacher's file to go on with. Leave out --resume to begin one there.")
    with contextlib.suppress(ValueError), path.open("rb") as file:
        header = json.loads(file.readline())
        if isinstance(header, dict) and header.get("version") == VERSION and "config" in header:
            return header
    raise UserError(f"{path} is damaged, or of another version of Plinth: its first line cannot be read. Remove {out} and begin again.")


class Parts:
    """The arrays of an unfinished file, and which micro-batches are whole in them."""

    def __init__(self, out: Path, shapes: Shapes, rows: Sequence[np.ndarray], warn: Callable[[str], None] = lambda text: None):
        """Open the arrays; `shapes` has shape and type of each by name, `rows` of each micro-batch its rows in them.

        Raises UserError for an array that is missing or has another size, while progress.jsonl says that something is in it.
        """
        self.folder, self.rows = Path(out), rows
        logged = self._logged()
        self.arrays = {name: self._open(name, shape, dtype, new=not logged) for name, (shape, dtype) in shapes.items()}
        self.whole = {part for part, checksum in logged.items() if self._checksum(part) == checksum}
        self._lock = threading.Lock()
        if lost := len(logged) - len(self.whole):
            warn(f"{out}: {lost} of {len(logged)} micro-batches in it are not as they were written, and are computed again.")

    def _logged(self) -> dict[int, int]:
        """Return the checksum of each micro-batch that progress.jsonl has, and cut off a last line that is not whole."""
        path, logged = self.folder / PROGRESS, {}
        written = path.read_bytes()
        if not written.endswith(b"\n"):
            written = written[: written.rfind(b"\n") + 1]
            write_atomic(path, written)
        for line in written.splitlines()[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["part"] in range(len(self.rows)):
                    logged[record["part"]] = record["crc32"]
        return logged

    def _open(self, name: str, shape: tuple[int, ...], dtype: type, new: bool) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if new:
            return np.lib.format.open_memmap(path, "w+", dtype, shape)
        try:
            array = np.lib.format.open_memmap(path, "r+")
        except (OSError, ValueError, SyntaxError, tokenize.TokenError) as error:  # the last two of a damaged header
            raise UserError(f"{path} is missing or damaged ({error}). Remove {self.folder} and begin again.") from None
        if (array.shape, array.dtype) != (shape, dtype):
            raise UserError(
                f"{path} holds {array.dtype} of shape {array.shape}, not {np.dtype(dtype)} of shape {shape}: it is not of this file. "
                f"Remove {self.folder} and begin again."
            )
        return array

    def _checksum(self, part: int) -> int:
        """Return the CRC-32 of a micro-batch's rows, array after array."""
        found = 0
        for array in self.arrays.values():
            found = zlib.crc32(array[self.rows[part]].tobytes(), found)
        return found

    def keep(self, part: int, columns: Sequence[np.ndarray]) -> None:
        """Write a micro-batch's rows of each array, then the line that says so; several threads may call this."""
        for array, column in zip(self.arrays.values(), columns):
            array[self.rows[part]] = column
        line = json.dumps({"part": part, "crc32": self._checksum(part)}) + "\n"
        with self._lock, (self.folder / PROGRESS).open("ab", buffering=0) as file:
            file.write(line.encode())

    def finish(self, manifest: dict[str, Any]) -> None:
        """Bring the arrays to the disk, then write teacher.json, with which the file is whole."""
        for array in self.arrays.values():
            assert isinstance(array, np.memmap)
            array.flush()
        write_atomic(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        (self.folder / PROGRESS).unlink()
