"""Dropout whose draws belong to a generator of the caller's, so that a step drops the same whenever it is run."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import numpy as np
import torch


def dropout_mask(shape: tuple[int, ...] | torch.Size, rate: float, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 - rate) where an element stays and 0 where it goes, in the dtype and on the device of `like`.

    Drawn from 16 random bits an element, so the rate is exact to one part in 65,536.
    """
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device).random_(-(2**63), None, generator=generator)
    draws = words.view(torch.int16)[:count].view(shape)
    kept = draws >= round(rate * 65536) - 32768
    return kept.to(like.device, like.dtype).mul_(1.0 / (1.0 - rate))


def dropout(x: torch.Tensor, rate: float, generator: torch.Generator | None) -> torch.Tensor:
    """Return x with elements set to zero at `rate`, the others divided by 1 - rate; without a generator, or at rate 0, x itself.

    Source: Srivastava et al. 2014, JMLR 15, in the inverted form that leaves use as it is.
    """
    if generator is None or not rate:
        return x
    return x * dropout_mask(x.shape, rate, generator, x)


_thread = threading.local()


@contextlib.contextmanager
def dropping(generator: torch.Generator | None) -> Iterator[None]:
    """Let `dropout_within` draw from a generator inside the block, in this thread alone; outside of any such block it drops nothing.

    For a module that may stand anywhere in a model, which would otherwise hand a generator through every layer above it.
    """
    before = getattr(_thread, "generator", None)
    _thread.generator = generator
    try:
        yield
    finally:
        _thread.generator = before


def dropout_within(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Return `dropout` of x by the generator of the innermost `dropping`, x itself outside of any."""
    return dropout(x, rate, getattr(_thread, "generator", None)) if rate else x


def seeded(seeds_B: torch.Tensor | None) -> torch.Generator | None:
    """Return the generator of a micro-batch, whose rows carry one seed, int64 (B,), each; None without seeds.

    So a batch says itself what is dropped, on whichever thread and in whichever run it is computed.
    """
    if seeds_B is None:
        return None
    return torch.Generator(seeds_B.device).manual_seed(int(seeds_B[0]))


def step_seeds(seed: int, step: int, part: int, rows: int) -> torch.Tensor:
    """Return the seed of micro-batch `part` of a step, once a row, int64 (rows,): a pure function of its arguments."""
    word = np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0]
    return torch.full((rows,), int(word >> np.uint64(1)))
