"""Ctrl-C at any moment of a command, so that its exit code is the documented one.

Python's own handler raises KeyboardInterrupt wherever the main thread is. Within an import that can be C++ code which calls Python and is
not made for an exception: PyTorch then aborts the process. And once a command has ended, while the interpreter is taken down, it ends the
process by the signal. So here the exception waits until no import is under way, and behind the end a Ctrl-C changes the code no more.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # as shells say of a process that Ctrl-C ended
INTERRUPTED_LINE = "stopped by Ctrl-C."
RETRY_S = 0.02  # between two looks whether the import has ended


class Interrupts:
    """What Ctrl-C does in a process that runs one command."""

    def __init__(self) -> None:
        self.code: int | None = None
        """the exit code, once it is settled"""
        self._waits = False

    def install(self) -> None:
        """Take the place of Python's own handler. Where Ctrl-C is ignored, as under nohup, it stays so."""
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        signal.signal(signal.SIGINT, self._interrupt)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the first one registered is the last one called
        if hasattr(signal, "SIGALRM"):  # not on Windows, where no import is waited for
            signal.signal(signal.SIGALRM, self._look_again)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.code is not None:
            self._leave(self.code)
        if not hasattr(signal, "SIGALRM") or not is_importing(frame):
            raise KeyboardInterrupt
        if self._waits:  # the second one: nobody wants to wait for the import
            os.write(2, f"plinth: {INTERRUPTED_LINE}\n".encode())
            self._leave(INTERRUPTED)
        self._waits = True
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)

    def _look_again(self, signum: int, frame: FrameType | None) -> None:
        """Give the signal that waits to whatever handler there is by now."""
        if not self._waits:
            return
        if is_importing(frame):
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
            return
        self._waits = False
        signal.raise_signal(signal.SIGINT)

    def _leave(self, code: int) -> None:
        """End the process without the interpreter's own end."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # gone already, or its reader has left
                stream.flush()
        os._exit(code)


def is_importing(frame: FrameType | None) -> bool:
    """Return whether a frame, or one that called it, is of an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
