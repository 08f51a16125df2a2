"""Running a training function on the workers of a Ray cluster, through Ray Train (the extra `cluster`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch

from plinth.config import UserError


def run_on_ray(function: Callable[[dict[str, Any]], None], arguments: dict[str, Any], num_workers: int, timeout_s: float = 600.0) -> None:
    """Call `function(arguments)` on `num_workers` Ray workers that form one torch.distributed process group.

    A GPU a worker where this machine has any, else a CPU core. Joins the cluster that the environment names (RAY_ADDRESS), or starts
    one on this machine. Raises UserError when Ray is not installed, and with the workers' own text when they fail.
    """
    if num_workers < 1:
        raise UserError(f"ray_workers={num_workers} must be at least 1.")
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise UserError(f"ray_workers={num_workers} needs Ray Train ({error}). Install it: pip install 'plinth-fm[cluster]'.") from None
    use_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="plinth-ray-") as storage:  # Ray's own record; ours is the run directory
        trainer = TorchTrainer(
            function,
            train_loop_config=arguments,
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=None if use_gpu else {"CPU": 1}),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(timeout_s)),
            run_config=RunConfig(storage_path=storage, name="plinth"),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise UserError(f"training on Ray failed: {_first_cause(error)}") from None


def _first_cause(error: BaseException) -> str:
    """Return the text of the error that a worker raised, which Ray wraps several times."""
    seen: list[BaseException] = []
    workers = getattr(error, "worker_failures", None) or {}
    stack: list[BaseException | None] = [*workers.values(), error]
    while stack:
        cause = stack.pop(0)
        if cause is None or cause in seen:
            continue
        seen.append(cause)
        if isinstance(cause, UserError) and str(cause):
            return str(cause)
        stack += [getattr(cause, "cause", None), cause.__cause__]
    return str(seen[-1]).strip().splitlines()[-1] if str(seen[-1]).strip() else repr(seen[-1])
