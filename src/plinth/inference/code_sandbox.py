"""Programs of unknown origin run against tests: a process of their own with bounds on time, memory, files, and no way out.

On Linux the kernel refuses what a program has no business with: sockets, new processes, signals to others (seccomp), and writing
anywhere but in its own temporary folder (Landlock). Elsewhere Python's audit hooks refuse the same, which a program that is written
against them can get around. Files can be read; what is read cannot leave. Whether tests passed is told with a secret that the program
never holds, so that leaving early, printing or exit codes prove nothing.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plinth.config import UserError
from plinth.inference import code_sandbox_child

MAX_REPORT_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    time_s: float = 5.0
    """processor seconds, rounded up; the clock may run four times as long, and two seconds more"""
    memory_bytes: int = 512 * 2**20
    """address space"""
    file_bytes: int = 2**20
    """largest file that it may write"""

    def __post_init__(self) -> None:
        for name in ("time_s", "memory_bytes", "file_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"{name}={value!r} must be a positive number.")


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    passed: bool
    """whether it ran to its end and then all tests did"""
    why: str
    """what went wrong, empty where nothing did"""


def check_tests(tests: str) -> None:
    """Raise UserError for tests that are no Python."""
    try:
        compile(tests, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"the tests {tests[:80]!r} are no Python: {error}.") from None


def passes_tests(program: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program, and then tests (Python source with assert) in the same namespace; blocks until both have ended.

    Raises UserError for tests that are no Python, and on systems without POSIX limits.
    """
    if os.name != "posix":
        raise UserError("programs are tested on Linux and macOS only: this system can't bound what they use.")
    check_tests(tests)
    limits, secret = limits or Limits(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="plinth-code-") as folder:
        job = {
            "program": program, "tests": tests, "secret": secret, "folder": folder, "time_s": math.ceil(limits.time_s),
            "memory_bytes": int(limits.memory_bytes), "file_bytes": int(limits.file_bytes),
        }  # fmt: skip
        report, status = _run(json.dumps(job).encode(), folder, 4 * limits.time_s + 2)
    if report == secret.encode():
        return Outcome(True, "")
    return Outcome(False, _why(report, status))


def _run(job: bytes, folder: str, clock_s: float) -> tuple[bytes, int | None]:
    """Return what the child reported and its exit status, None where the clock ran out; nothing of it is left behind."""
    command = [sys.executable, "-I", "-S", "-B", str(Path(code_sandbox_child.__file__))]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, start_new_session=True,
        env={"HOME": folder, "TMPDIR": folder, "PATH": "", "LANG": "C.UTF-8"},
    )  # fmt: skip
    try:
        report, _ = process.communicate(job, timeout=clock_s)
        return report[:MAX_REPORT_BYTES], process.returncode
    except subprocess.TimeoutExpired:
        return b"", None
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has ended, and nothing of its group is left
        pass
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _why(report: bytes, status: int | None) -> str:
    if status is None:
        return "took longer than the clock allows"
    if status == -signal.SIGXCPU or (status == -signal.SIGKILL and not report):
        return "took more processor time than it may, or was killed"
    if status < 0:
        return f"ended by signal {-status}"
    return report.decode("utf-8", "replace") or "ended before its tests did"
