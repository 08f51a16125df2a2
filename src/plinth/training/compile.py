"""Compiling the blocks of a model for the time of its training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

COMPILE_PAYS_STEPS = 300  # on a GPU a shorter run would hardly earn back the half minute or so that compiling takes


@contextlib.contextmanager
def compiled_blocks(model: nn.Module, enabled: bool = True, *, backend: str | Callable = "inductor") -> Iterator[None]:
    """Compile `forward` of each of `model.layers` for the block; afterwards the model is as it was. A model without any stays as it is.

    All layers share what is compiled, so the time it takes does not grow with the depth; a second shape of batches is
    compiled once more, for any shape. What is between the blocks,
    embedding and loss, is left as it is: the loss compiles its own inner part on a GPU (`ops.chunked_loss`).
    """
    layers = list(getattr(model, "layers", ())) if enabled else []
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
