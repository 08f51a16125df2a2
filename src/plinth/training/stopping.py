"""Signals that ask training to save and stop: Ctrl-C, SIGTERM, and SIGUSR1, with which schedulers warn of an end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from plinth.config import UserError

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, nothing wrong, call again


class Stopped(UserError):
    """Training was asked to stop, saved a checkpoint, and can be resumed."""

    exit_code = EXIT_STOPPED


class StopRequest:
    """Set by a signal, read between steps."""

    requested = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn Ctrl-C, SIGTERM and SIGUSR1 into a request that is honoured after the step.

    A second Ctrl-C interrupts at once; a second SIGTERM does not, because schedulers and launchers send it several times.
    """
    request = StopRequest()
    previous: dict[int, Any] = {}

    def ask(signum: int, frame: Any) -> None:
        request.requested = True
        if signum == signal.SIGINT:
            signal.signal(signum, previous[signum])

    with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere there is nothing to catch
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # no SIGUSR1 on Windows
            if signum := getattr(signal, name, None):
                previous[signum] = signal.signal(signum, ask)  # refused outside the main thread: then there is nothing to restore
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
