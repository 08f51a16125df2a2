"""How the C library hands out memory while training."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
HOLD_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next step instead of returning them to the system; True when it obeyed.

    A training step frees and takes the same large blocks every time. By default glibc maps each anew, and every first
    touch of a page is a fault; measured, that costs more than many of the operations on the blocks themselves.
    Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, HOLD_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
