"""The one training step of the project: gradients over micro-batches, checks, and one optimizer update."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from plinth.ops.linear import GradientSums, WeightGradient, collect_gradients
from plinth.training.device import move_batch
from plinth.training.memory import keep_freed_memory, release_freed_memory
from plinth.training.optim import Optimizer
from plinth.training.precision import DTYPES, MasterWeights

Batch = Any
Sum = float | torch.Tensor
LossFunction = Callable[[nn.Module, Batch], tuple[torch.Tensor, Sum, dict[str, Sum]]]
"""(model, batch) -> loss sum in nats (a scalar with gradient), count, and sums of further metrics.

On a GPU count and metrics should be scalars there, so that nothing waits for the GPU before the step's one look."""
READ_TENSORS = ("inputs", "prompts", "completions")  # of a batch by names, those whose every number is a token that is read


@dataclass(frozen=True)
class StepResult:
    """What one step measured; `loss_nats` and `metrics` are divided by the count over all micro-batches."""

    loss_nats: float
    count: float
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)
    applied: bool = True
    """whether the update was made"""


class NonFiniteError(ArithmeticError):
    """Loss or gradient is not finite; raised before the weights are touched."""


class InlineWorker:
    """The calling thread itself: it gives a GPU its work, which does it side by side; or it is one rank of several."""

    num_threads = 1

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Apply `function` to each item in turn."""
        return [function(item) for item in items]

    def close(self) -> None:
        """Do nothing."""


class Workers:
    """Threads that share the weights and split the micro-batches of a step.

    Each runs its operations on one core: small tensors stay in that core's cache, and there is one meeting a step
    instead of one an operation, so that other load on the machine costs no more than the time it takes. Results are
    added in the order of the micro-batches, so they depend on the number of threads only through their grouping.
    """

    def __init__(self, num_threads: int):
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, initializer=_start_worker)
        # All threads are set up before any computes: setting a thread's number of cores also clears caches that all share.
        everyone = threading.Barrier(num_threads)
        self.map(lambda _: everyone.wait(), range(num_threads))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Apply `function` to each item, one item a thread at a time, results in order."""
        return list(self._pool.map(function, items))

    def close(self) -> None:
        self._pool.shutdown()


def start_workers(num_threads: int, device: str | torch.device) -> Workers | InlineWorker:
    """Return worker threads for a CPU, else the calling thread, for work beside training; close them when it is done."""
    return Workers(num_threads) if torch.device(device).type == "cpu" else InlineWorker()


def _start_worker() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # numbers below 1e-38 count as zero: processors take long over them


def _wake_matrix_library() -> None:
    """Let the first matrix products run in one thread, so that what they set up once is set up before several threads need it."""
    for dtype in DTYPES.values():
        block = torch.ones(64, 64, dtype=dtype)
        torch.bmm(block[None], torch.mm(block, block)[None])


@contextlib.contextmanager
def open_workers(num_threads: int, device: str = "cpu", *, inline: bool = False) -> Iterator[Workers | InlineWorker]:
    """Give worker threads, or on a GPU the calling thread; on a CPU its own operations meanwhile use one core.

    `inline` takes the calling thread on a CPU too: sharded models can be driven from one thread only.
    """
    if torch.device(device).type != "cpu":
        yield InlineWorker()
        return
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _wake_matrix_library()
    workers = None if inline else Workers(num_threads)
    try:
        if workers is None:
            torch.set_flush_denormal(True)
        yield workers or InlineWorker()
    finally:
        if workers is None:
            torch.set_flush_denormal(False)
        else:
            workers.close()
        torch.set_num_threads(before)
        release_freed_memory()


MicroBatchGradients = tuple[torch.Tensor, Sum, dict[str, Sum], Sequence[torch.Tensor | None]]
"""Loss sum, count, metric sums, and the gradient of the loss sum in the model's dtype, None for parameters that it does not reach."""


def take_gradients(masters: MasterWeights, loss_function: LossFunction, batch: Batch) -> MicroBatchGradients:
    """Run one micro-batch forward and backward."""
    loss, count, metrics = loss_function(masters.model, move_batch(batch, masters.device))
    return loss.detach(), count, metrics, torch.autograd.grad(loss, masters.parameters, allow_unused=True)


def split_gradients(
    masters: MasterWeights,
    loss_function: LossFunction,
    batches: Sequence[Batch],
    workers: Workers | InlineWorker,
    gradients: Callable[..., MicroBatchGradients] = take_gradients,
) -> tuple[Sum, Sum, dict[str, Sum], list[torch.Tensor]]:
    """Return loss sum, count, metric sums, and the fp32 gradient of the loss sum over all micro-batches.

    On a GPU the sums are scalars there, still being computed. One rank of several gets the sums over all and its shards.
    """
    if masters.ranks is not None:
        return masters.gradients(loss_function, batches)

    def run(share: Sequence[Batch]):
        total, loss_sum, count, sums = [None] * len(masters.parameters), 0.0, 0.0, {}
        with collect_gradients() as collected:
            for batch in share:
                loss, batch_count, metrics, grads = gradients(masters, loss_function, batch)
                _accumulate(total, grads)
                loss_sum, count = loss_sum + loss.double(), count + batch_count
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
        return loss_sum, count, sums, total, collected

    parts = workers.map(run, share_out(batches, min(workers.num_threads, len(batches))))
    totals, collected = [part[3] for part in parts], [part[4] for part in parts]
    jobs = [(parameter, [total[i] for total in totals]) for i, parameter in enumerate(masters.parameters)]
    grads = workers.map(lambda job: _add_up(job[0], job[1], collected), jobs)
    sums: dict[str, Sum] = {}
    for part in parts:
        for name, value in part[2].items():
            sums[name] = sums.get(name, 0.0) + value
    return sum(part[0] for part in parts), sum(part[1] for part in parts), sums, grads


def share_out(batches: Sequence[Batch], n: int) -> list[list[Batch]]:
    """Return n shares of the micro-batches with about as many tokens each, for threads that are to end together.

    The largest is dealt first, each to the share that has least. Batches of one size stay in their order, as many to each share.
    """
    sizes = [batch_tokens(batch) for batch in batches]
    if len(set(sizes)) == 1:
        bounds = [len(batches) * i // n for i in range(n + 1)]
        return [list(batches[a:b]) for a, b in zip(bounds, bounds[1:])]
    shares: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(batches)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    return [[batches[i] for i in sorted(share)] for share in shares]


def batch_tokens(batch: Batch) -> int:
    """Return how many tokens a micro-batch makes a model read, padding included; 1 where that is not known.

    They are the numbers in the first tensor of a sequence, and in those of a mapping that READ_TENSORS names.
    """
    parts = batch[:1] if isinstance(batch, Sequence) else []
    if isinstance(batch, Mapping):
        parts = [batch[name] for name in READ_TENSORS if name in batch]
    return sum(part.numel() for part in parts if isinstance(part, torch.Tensor)) or 1


def read_scalars(values: Sequence[Sum]) -> list[float]:
    """Return the values as numbers; those on a GPU come in one copy, which waits for it."""
    tensors = [value.double() for value in values if isinstance(value, torch.Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(numbers) if isinstance(value, torch.Tensor) else value for value in values]


def _accumulate(total: list[torch.Tensor | None], grads: Sequence[torch.Tensor | None]) -> None:
    """Add the gradients of a micro-batch to fp32 totals, in place; None is no gradient.

    Autograd may give one tensor to two parameters that are added to each other, or a slice of a larger one to a parameter that was put
    into it. Each total has memory of its own, in the order of its parameter's: the fused optimizer reads it as one stretch of numbers.
    """
    both = [i for i, grad in enumerate(grads) if grad is not None and total[i] is not None]
    taken: set[int] = set()
    for i, grad in enumerate(grads):
        if grad is not None and total[i] is None:
            wide = grad.float().contiguous()
            total[i] = wide.clone() if wide.data_ptr() in taken else wide
            taken.add(wide.data_ptr())
    if both:
        torch._foreach_add_([total[i] for i in both], [grads[i].float() for i in both])


def _add_up(parameter: torch.Tensor, totals: Sequence[torch.Tensor | None], collected: Sequence[GradientSums]) -> torch.Tensor:
    """Return one parameter's gradient over all threads, fp32: what autograd gave and what the kernels collected."""
    found = [total for total in totals if total is not None] + [sums for thread in collected for sums in thread.filled_plain(parameter)]
    whole = found[0] if found else None
    for other in found[1:]:
        whole.add_(other)
    if sums := [part for thread in collected for part in thread.filled(parameter)]:
        return WeightGradient.gather(sums, whole)
    return torch.zeros(parameter.shape, device=parameter.device) if whole is None else whole


def train_step(
    masters: MasterWeights,
    loss_function: LossFunction,
    batches: Sequence[Batch],
    optimizer: Optimizer,
    workers: Workers | InlineWorker,
    *,
    lr_scale: float = 1.0,
    clip_grad_norm: float | None = 1.0,
    gradients: Callable[..., MicroBatchGradients] = take_gradients,
    allows: Callable[[StepResult], bool] | None = None,
) -> StepResult:
    """Do one optimizer update on the mean loss of all micro-batches.

    The mean is taken once, over the count of all micro-batches together. `allows` sees what was measured before the update and may
    refuse it (then neither weights nor optimizer change) or raise; without it, NonFiniteError is raised before the update when loss
    or gradient is not finite. Raises ValueError when no token is counted. Waits for a GPU once, before the update. `gradients` does one
    micro-batch: operation by operation, or as a CUDA graph (`training.graphs`).
    """
    loss_sum, count, sums, grads = split_gradients(masters, loss_function, batches, workers, gradients)
    scale_all(grads, (1.0 / torch.as_tensor(count, dtype=torch.float64, device=masters.device)).float(), workers)
    loss_sum, count, grad_norm, *values = read_scalars([loss_sum, count, masters.norm(grads, workers), *sums.values()])
    if not count:
        raise ValueError("the batch holds no supervised token.")
    loss = loss_sum / count
    result = StepResult(loss, count, grad_norm, {name: value / count for name, value in zip(sums, values)})
    if not (allows or finite_only)(result):
        return replace(result, applied=False)
    if clip_grad_norm is not None and grad_norm > clip_grad_norm:
        scale_all(grads, clip_grad_norm / grad_norm, workers)
    optimizer.step(dict(zip(masters.names, grads)), lr_scale, workers)
    masters.publish(workers)
    return result


def scale_all(grads: list[torch.Tensor], factor: torch.Tensor | float, workers: Workers | InlineWorker) -> None:
    """Multiply all gradients in place: on a GPU in one call, on a CPU by all workers."""
    if grads[0].device.type == "cpu":
        workers.map(lambda grad: grad.mul_(factor), grads)
    else:
        torch._foreach_mul_(grads, factor)


def finite_only(result: StepResult) -> bool:
    """Return True; raise NonFiniteError when loss or gradient norm is not finite."""
    if not (abs(result.loss_nats) < float("inf") and result.grad_norm < float("inf")):
        raise NonFiniteError(f"loss {result.loss_nats} and gradient norm {result.grad_norm} are not both finite.")
    return True
