"""Grammars that could hold their compiler for long are compiled on trial first, in a process that may be ended.

The compiler counts its own work, but not all of it: some intersections of patterns double with each pattern.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_LIMIT_S = 1
WALL_LIMIT_S = 10.0  # the processor may be busy with other things
MEMORY_LIMIT_BYTES = 2 << 30
PLAIN_BYTES = 1 << 13  # sources up to this size are looked at, larger ones always tried
PLAIN_BYTES_OF_NAMES = 1 << 10  # where names have patterns, each pair of which is compared
PLAIN_PATTERNS = 8
EXPRESSIONS = re.compile(r'"(pattern|patternProperties|format)"\s*:')


def needs_trial(kind: str, source: str) -> bool:
    """Return whether a grammar may take long: a large one, one of many patterns, any that is written freely."""
    if kind == "lark":
        return True
    if kind == "choice":
        return False
    if len(source) > (PLAIN_BYTES_OF_NAMES if '"patternProperties"' in source else PLAIN_BYTES):
        return True
    return kind != "regex" and len(EXPRESSIONS.findall(source)) > PLAIN_PATTERNS


class Trial:
    """A process that compiles grammars for no purpose but to see that they end. It starts at the first of them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def passes(self, compiled_source: str, limits: dict[str, int]) -> bool:
        """Return whether a grammar is compiled, or refused, within the limits of time and memory."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([compiled_source, limits]).encode() + b"\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], WALL_LIMIT_S)
                if ready and process.stdout.readline() == b"done\n":
                    return True
            except OSError:
                pass  # it has ended
            self.close()
            return False

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-c", "from plinth.inference.trial import serve; serve()"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
        return self._process


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@lru_cache(maxsize=1)
def shared_trial() -> Trial:
    """Return the one trial process of this one; it ends with it."""
    trial = Trial()
    atexit.register(trial.close)
    return trial


def serve() -> None:
    """Be the trial process: read grammars, one a line, and answer each when it is done."""
    tokenizer = LLTokenizer("byte")
    for line in sys.stdin.buffer:
        source, limits = json.loads(line)
        _limit_resources()
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(**limits))
        if not matcher.is_error():
            matcher.compute_bitmask()
        sys.stdout.write("done\n")
        sys.stdout.flush()


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # no such limits on Windows; the wall's limit stays
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + CPU_LIMIT_S, most))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
