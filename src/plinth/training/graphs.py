"""Forward and backward of a micro-batch as one CUDA graph: recorded once for each shape, then launched as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plinth.config import UserError
from plinth.training.precision import MasterWeights
from plinth.training.step import LossFunction, MicroBatchGradients, take_gradients

MOST_SHAPES = 4
WARM_UP_RUNS = 3  # what is set up at first use (kernels compiled, handles made, memory taken) must not be recorded


class GraphedGradients:
    """Takes `take_gradients`'s place in the step on a GPU.

    A small model's operations end sooner than the processor can launch the next ones; a graph launches them all at once.
    The batch is a tuple of tensors and the loss waits for no value, as a recorded one cannot. The gradients lie in the
    graph's own memory, so those in fp32 are copied out; bf16 ones are copied by the sum in fp32 anyway.
    """

    def __init__(self) -> None:
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], MicroBatchGradients]] = {}

    def __call__(self, masters: MasterWeights, loss_function: LossFunction, batch: Sequence[torch.Tensor]) -> MicroBatchGradients:
        """Return what `take_gradients` returns. Raises UserError when the batches have more than MOST_SHAPES shapes."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in batch)
        if shapes not in self._recorded:
            if len(self._recorded) == MOST_SHAPES:
                raise UserError(
                    f"cuda_graphs=true: the batches have more than {MOST_SHAPES} shapes, and each needs a graph with memory of its own. "
                    "Leave it out for batches of many shapes."
                )
            self._recorded[shapes] = _record(masters, loss_function, batch)
        graph, inputs, (loss, count, metrics, grads) = self._recorded[shapes]
        _fill(inputs, batch)
        graph.replay()
        metrics = {name: _copied(value) for name, value in metrics.items()}
        return loss.clone(), _copied(count), metrics, [_copied(g) if g is not None and g.dtype == torch.float32 else g for g in grads]


def _record(masters: MasterWeights, loss_function: LossFunction, batch: Sequence[torch.Tensor]):
    inputs = [torch.empty_like(tensor, device=masters.device) for tensor in batch]
    _fill(inputs, batch)
    side = torch.cuda.Stream(masters.device)
    side.wait_stream(torch.cuda.current_stream(masters.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            take_gradients(masters, loss_function, tuple(inputs))
    torch.cuda.current_stream(masters.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = take_gradients(masters, loss_function, tuple(inputs))
    return graph, inputs, result


def _fill(inputs: Sequence[torch.Tensor], batch: Sequence[torch.Tensor]) -> None:
    for own, tensor in zip(inputs, batch):
        own.copy_(tensor.pin_memory() if tensor.device.type == "cpu" else tensor, non_blocking=True)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
