"""Runs that end in the midst of a step, as if their process had been killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@contextlib.contextmanager
def killed_at(call: int, owner: Any, name: str) -> Iterator[None]:
    """Let call number `call` of a module's or class's function raise Killed, and see that it ends the block."""
    seen, whole = [], getattr(owner, name)

    def killing(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == call:
            raise Killed
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killing)
        yield
