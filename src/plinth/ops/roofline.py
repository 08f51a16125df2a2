"""What the device can do at most, measured: the rate of a large matrix product, and the bandwidth of a copy.

torch is imported where it is used: plans are read by commands that never compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MATMUL_SHAPES = {"cpu": (2048, 512, 2048), "cuda": (8192, 8192, 8192)}  # rows, inner, columns: large enough for the full rate
LIMIT_S = 0.4


def matmul_rate(dtype: str, *, device: str = "cpu", num_threads: int | None = None, seed: int = 0, limit_s: float = LIMIT_S) -> float:
    """Return FLOP/s of a large matrix product on `device`: the best of the repeats within `limit_s` seconds.

    It is the roof that MFU refers to, so that MFU is a share of this machine and not of a data sheet. `num_threads` are the cores
    that a run will use (None: as many as torch uses now); a device other than the CPU ignores it.
    """
    import torch

    kind = getattr(torch, dtype)
    rows, inner, columns = MATMUL_SHAPES.get(torch.device(device).type, MATMUL_SHAPES["cpu"])
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=generator).to(device, kind)
    right = torch.randn(inner, columns, generator=generator).to(device, kind)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        seconds = best_time(lambda: torch.mm(left, right), limit_s, device)
    finally:
        torch.set_num_threads(before)
    return 2.0 * rows * inner * columns / seconds


def copy_bandwidth(size_bytes: int = 1 << 27, limit_s: float = LIMIT_S, device: str = "cpu") -> float:
    """Return bytes read plus written a second by a copy far larger than the caches."""
    import torch

    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * size_bytes / best_time(lambda: target.copy_(source), limit_s, device)


def read_bandwidth(size_bytes: int, num_threads: int, limit_s: float = LIMIT_S) -> float:
    """Return bytes a second at which our threads read `size_bytes` of memory again and again and do nothing else: the roof of decoding.

    Raises RuntimeError where our kernels cannot run.
    """
    import torch

    from plinth.ops import kernels

    if (library := kernels.library()) is None:
        raise RuntimeError(f"read_bandwidth needs our kernels: {kernels.why_not()}")
    memory = torch.ones(size_bytes, dtype=torch.uint8)
    return size_bytes / best_time(lambda: library.read_memory(memory.data_ptr(), size_bytes, num_threads), limit_s)


def best_time(call: Callable[[], object], limit_s: float, device: str = "cpu") -> float:
    """Return the shortest of the calls that fit in `limit_s`; the first, which pays for set-up, only if it is alone."""
    import torch

    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    deadline = time.perf_counter() + limit_s
    best, calls = float("inf"), 0
    while calls < 2 or (time.perf_counter() < deadline and calls < 200):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        elapsed = time.perf_counter() - started
        best = elapsed if calls == 1 else min(best, elapsed)
        calls += 1
        if calls == 1 and elapsed > limit_s:
            break
    return max(best, 1e-9)
