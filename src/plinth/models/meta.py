"""A model's shape without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)
DRAWS = {
    torch.Tensor.normal_, torch.Tensor.uniform_,
    nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_,
}  # fmt: skip


class _WithoutDraws(TorchFunctionMode):
    """PyTorch's modules draw weights as they are made; on the meta device that imports a library of symbols and takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def on_meta(build: Callable[[], Model]) -> Model:
    """Return the module that `build` makes, all its tensors on the meta device, none drawn."""
    with torch.device("meta"), _WithoutDraws():
        return build()
