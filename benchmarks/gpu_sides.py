"""The two sides of the benchmarks for GPUs, each a model with its training step: ours, and a plain GPT as PyTorch users write it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from plain_gpt import PlainGPT, build_adamw
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.training.compile import compiled_blocks
from plinth.training.device import device_settings, move_batch
from plinth.training.graphs import GraphedGradients
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights
from plinth.training.step import open_workers, take_gradients, train_step

Rows = tuple[torch.Tensor, torch.Tensor]
"""inputs and targets of one micro-batch, int64 (B, T), on the CPU"""


@dataclass(frozen=True)
class Shape:
    """A decoder; ours has a gated feed-forward layer two thirds as wide as the plain one's, so both have the same matrices' sizes."""

    layers: int
    width: int
    heads: int
    context: int
    vocab: int

    def config(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab, hidden_size=self.width, num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.heads,
            head_dim=self.width // self.heads, intermediate_size=round(self.width * 8 / 3 / 128) * 128 or 32, max_seq_len=self.context,
        )  # fmt: skip


class Side(Protocol):
    """Something that trains: `step` does one update and returns the mean loss before it, nats a token."""

    def step(self, micro_batches: Sequence[Rows], lr_scale: float = 1.0) -> float: ...

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...

    def close(self) -> None: ...


class Ours:
    """The project's model, step and optimizer."""

    def __init__(
        self, shape: Shape, device: str, dtype: str, *, optimizer: OptimizerConfig, compiled: bool, graphs: bool = False, seed: int = 0
    ):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(device_settings(device))
        self._workers = self._stack.enter_context(open_workers(1, device, inline=True))
        model = Transformer(shape.config()).init_weights(torch.Generator().manual_seed(seed))
        self._masters = MasterWeights(model, DTYPES[dtype], device)
        self._optimizer = build_optimizer(self._masters, optimizer)
        self._gradients = GraphedGradients() if graphs else take_gradients
        self._stack.enter_context(compiled_blocks(model, compiled))

    def step(self, micro_batches: Sequence[Rows], lr_scale: float = 1.0) -> float:
        arguments = (self._masters, causal_lm_loss, micro_batches, self._optimizer, self._workers)
        return train_step(*arguments, lr_scale=lr_scale, gradients=self._gradients).loss_nats

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self._masters.model.logits(self._masters.model(tokens_BT))

    def close(self) -> None:
        self._stack.close()


class Plain:
    """A plain GPT with fp32 weights, bf16 autocast, AdamW (fused on a GPU) and gradients clipped at 1."""

    def __init__(self, shape: Shape, device: str, dtype: str, *, compiled: bool, lr: float = 6e-4, seed: int = 0):
        torch.manual_seed(seed)
        self._device = torch.device(device)
        self._model = PlainGPT(shape.vocab, shape.layers, shape.width, shape.heads, shape.context).to(device)
        self._optimizer = build_adamw(self._model, lr, fused=True)
        self._lr, self._bf16 = lr, dtype == "bfloat16"
        self._loss = torch.compile(self._forward_loss) if compiled else self._forward_loss

    def _forward_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self._model(inputs).flatten(0, 1).float(), targets.flatten())

    def step(self, micro_batches: Sequence[Rows], lr_scale: float = 1.0) -> float:
        total = torch.zeros((), device=self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * lr_scale
        for batch in micro_batches:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._loss(*move_batch(batch, self._device)) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total)

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return self._model(tokens_BT)

    def close(self) -> None:
        pass
