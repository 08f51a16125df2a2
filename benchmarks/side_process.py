"""A side of a benchmark in a process of its own: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any


class SideProcess:
    """A side that was started and answers when it is ready, then once for each piece of work."""

    def __init__(self, command: Sequence[object]):
        self.process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, Any]:
        """Return the next line. Raises SystemExit when the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, work: dict[str, Any]) -> dict[str, Any]:
        """Give it work and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
