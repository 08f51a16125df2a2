"""Where training computes: choosing the device, moving batches to it, its settings, its memory."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch

from plinth.config import UserError


def check_device_name(name: str | None) -> None:
    """Raise UserError unless `name` is None or reads like a device that training supports."""
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device={name!r} is not cpu, cuda or cuda:N. Leave it out to take a GPU where there is one.")


def choose_device(name: str | None = None) -> str:
    """Return `name`, or, when it is None, cuda where PyTorch sees a GPU and else cpu.

    Raises UserError when a GPU is named that PyTorch does not see.
    """
    check_device_name(name)
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(name).index or 0) >= count:
        build = "this PyTorch is built without CUDA" if torch.version.cuda is None else f"PyTorch sees {count} GPUs"
        raise UserError(f"device={name} is not there: {build}. Use --device cpu, or see docs/gpu.md.")
    return name


def move_batch(batch: Any, device: str | torch.device) -> Any:
    """Return the batch with its tensors on `device`; tuples, lists and dictionaries keep their shape.

    From the CPU to a GPU the copy goes through pinned memory and does not wait.
    """
    if torch.device(device).type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        if batch.device.type == "cpu" and torch.device(device).type == "cuda":
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        return type(batch)(move_batch(part, device) for part in batch)
    if isinstance(batch, dict):
        return {name: move_batch(part, device) for name, part in batch.items()}
    return batch


def pin_batch(batch: Any) -> Any:
    """Return the batch with its tensors in memory that a GPU reads by itself; as it is where there is no CUDA."""
    if not torch.cuda.is_available():
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.pin_memory()
    if isinstance(batch, (tuple, list)):
        return type(batch)(pin_batch(part) for part in batch)
    return batch


@contextlib.contextmanager
def device_settings(device: str, *, tf32: bool = False, deterministic: bool = False) -> Iterator[None]:
    """Set for the block how a GPU multiplies fp32 matrices and whether equal runs give equal bits; put back after it.

    `tf32` keeps 10 bits of an fp32 operand's fraction instead of 23, which the matrix units multiply several times
    faster; products of bf16 operands are not touched. `deterministic` takes the deterministic twin of every operation
    (the backward passes of attention and embedding otherwise add in the order in which threads arrive) and fails on an
    operation that has none.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives equal bits only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    torch.cuda.init()  # the statistics are there only after it
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
        torch.use_deterministic_algorithms(before[1])


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the largest memory so far: a GPU's tensors since `device_settings` began, else this process's resident size."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
