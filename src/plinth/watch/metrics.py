"""metrics.jsonl as it grows: only what was appended is read, and columns are thinned for drawing."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np

NAN = float("nan")
CHUNK_BYTES = 16 << 20


class MetricsFile:
    """The numbers of a metrics.jsonl in columns, one entry a step, and its incidents; `poll` reads what has come since.

    A line that is not finished yet waits for its end. A file that was cut or replaced, as a resume does, is read anew.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.version = 0
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, array] = {}
        self.num_steps = 0
        self.incidents: list[dict[str, Any]] = []
        self.num_skipped = 0
        self.texts: dict[str, str] = {}
        self._offset, self._rest = 0, b""
        self._inode: int | None = None

    def poll(self) -> bool:
        """Read what was appended; return whether anything changed."""
        try:
            status = self.path.stat()
        except OSError:
            changed = self.num_steps > 0
            if changed:
                self._clear()
                self.version += 1
            return changed
        if self._inode is not None and (status.st_ino != self._inode or status.st_size < self._offset):
            self._clear()
            self.version += 1
        self._inode = status.st_ino
        if status.st_size == self._offset:
            return False
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while block := file.read(CHUNK_BYTES):
                self._offset += len(block)
                *lines, self._rest = (self._rest + block).split(b"\n")
                for line in lines:
                    self._add(line)
        self.version += 1
        return True

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a crash, with the next line written behind it
            return
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return
        if record.get("event"):
            self.incidents.append(record)
            self.num_skipped += bool(record.get("skipped"))
        if "tokens" not in record:  # the update that training stopped before
            return
        for name, value in record.items():
            if isinstance(value, str):
                self.texts[name] = value
            elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                column = self._columns.setdefault(name, array("d"))
                column.extend([NAN] * (self.num_steps - len(column)))
                column.append(NAN if value is None else value)
        self.num_steps += 1

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def column(self, name: str) -> np.ndarray:
        """Return a column, float64, shape (num_steps,); NaN where a line did not have it."""
        values = np.full(self.num_steps, NAN)
        known = np.array(self._columns.get(name, ()))
        values[: len(known)] = known
        return values

    def last(self, name: str) -> float | None:
        """Return the newest finite value of a column, or None."""
        for value in reversed(self._columns.get(name, ())):
            if math.isfinite(value):
                return value
        return None

    def recent(self, name: str, count: int) -> list[float]:
        """Return the finite values among the last `count` of a column."""
        return [value for value in self._columns.get(name, ())[-count:] if math.isfinite(value)]


def thin(x: np.ndarray, y: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about `limit` of the finite points: of each bucket the lowest and the highest, so that no spike is lost."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= limit:
        return x, y
    size = math.ceil(2 * len(x) / limit)
    padded = np.append(y, np.full(-len(y) % size, y[-1])).reshape(-1, size)
    starts = np.arange(len(padded)) * size
    kept = np.unique(np.concatenate([[0], starts + padded.argmin(1), starts + padded.argmax(1), [len(y) - 1]]))
    kept = kept[kept < len(y)]
    return x[kept], y[kept]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving mean over `window` points, shortened at both ends so that it adds no lag."""
    half = max(window // 2, 0)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    high, low = np.minimum(index + half + 1, len(y)), np.maximum(index - half, 0)
    return (sums[high] - sums[low]) / (high - low)
