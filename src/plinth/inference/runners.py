"""Which runner runs a model."""

from __future__ import annotations

from typing import Any, Literal

import torch

from plinth.config import UserError
from plinth.inference.native_runner import NativeRunner, why_not_native
from plinth.inference.runner import Runner
from plinth.inference.torch_runner import TorchRunner
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer

Weights = Literal["fp32", "bf16", "int8", "int4"]


def loading_dtype(config: Any, weights: Weights | None, device: torch.device | str = "cpu") -> torch.dtype | None:
    """Return the type to load a model in for `make_runner`: None, as it is stored, where our kernels pack it in bf16 anyway, else fp32."""
    packs = weights in (None, "bf16") and torch.device(device).type == "cpu"
    return None if packs and isinstance(config, DecoderConfig) and why_not_native(config) is None else torch.float32


def make_runner(model: Transformer, weights: Weights | None = None) -> Runner:
    """Return the fastest runner that runs a model with its weights in this format.

    None = bf16 on our own kernels where they take the model, else the model as it is in PyTorch. fp32 and, where the
    kernels do not take the model, bf16 run in PyTorch. Raises UserError where int8 or int4 cannot run.
    """
    on_cpu = model.embed.weight.device.type == "cpu"
    if weights == "fp32":
        return TorchRunner(model.float())
    if weights in ("int8", "int4"):
        if not on_cpu:
            raise UserError(f"weights={weights} runs on the processor only, and the model is on {model.embed.weight.device}. Use bf16.")
        return NativeRunner(model, weights)
    if on_cpu and why_not_native(model.config) is None:
        return NativeRunner(model)
    return TorchRunner(model if weights is None else model.to(torch.bfloat16))
