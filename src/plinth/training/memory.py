"""How the C library hands out memory while training."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
HOLD_BYTES = (1 << 31) - 1
HUGE_PAGE_BYTES, MADV_HUGEPAGE = 2 << 20, 14
USUAL_BYTES = 128 * 1024  # glibc's own threshold for both


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next step instead of returning them to the system; True when it obeyed.

    A training step frees and takes the same large blocks every time. By default glibc maps each anew, and every first
    touch of a page is a fault.
    Other C libraries are left alone.
    """
    obeyed = _mallopt((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, HOLD_BYTES))
    if obeyed:
        _advise_huge_pages()
    return obeyed


def _advise_huge_pages(reserve_bytes: int = (1 << 30) - (1 << 16)) -> None:
    """Ask Linux for pages of 2 MB in the next stretch of the heap, so that a step, which touches all of it, needs fewer page-table entries.

    The stretch is taken and given back untouched, so it costs no memory.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    blocks = [libc.malloc(reserve_bytes), libc.malloc(HOLD_BYTES - reserve_bytes - (1 << 27))]
    for block, size in zip(blocks, (reserve_bytes, HOLD_BYTES - reserve_bytes - (1 << 27))):
        if block:
            start = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
            libc.madvise(start, (block + size - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, MADV_HUGEPAGE)
    for block in reversed(blocks):
        libc.free(block)


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
