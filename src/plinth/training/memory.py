"""How the C library hands out memory while training."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
HOLD_BYTES = (1 << 31) - 1
USUAL_BYTES = 128 * 1024  # glibc's own threshold for both


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next step instead of returning them to the system; True when it obeyed.

    A training step frees and takes the same large blocks every time. By default glibc maps each anew, and every first
    touch of a page is a fault.
    Other C libraries are left alone.
    """
    return _mallopt((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, HOLD_BYTES))


def release_freed_memory() -> bool:
    """Undo `keep_freed_memory` and give what is free back to the system; True when glibc obeyed."""
    if not _mallopt((M_MMAP_THRESHOLD, USUAL_BYTES), (M_TRIM_THRESHOLD, USUAL_BYTES)):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _mallopt(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in settings)
