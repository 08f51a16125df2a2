"""Optimizers on fp32 master weights: AdamW, and Muon for the hidden matrices with AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from plinth.config import UserError
from plinth.training.precision import MasterWeights

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STACK_ELEMENTS = 1 << 27  # of the matrices orthogonalised in one call: a few copies of them live at a time


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for hidden matrices, AdamW for embeddings, head and scales; adamw: AdamW for all"""
    lr: float = 0.004
    """peak learning rate of AdamW"""
    muon_lr: float = 0.02
    """peak learning rate of Muon, as the root mean square of a square matrix's singular values moved a step"""
    beta1: float = 0.9
    """decay of AdamW's first moment"""
    beta2: float = 0.98
    """decay of AdamW's second moment"""
    eps: float = 1e-10
    """added to the root of AdamW's second moment"""
    momentum: float = 0.95
    """decay of Muon's momentum (Nesterov)"""
    weight_decay: float = 0.1
    """decay of hidden matrices, relative to the learning rate"""
    newton_schulz_steps: int = 5
    """iterations that orthogonalise Muon's update"""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True)
class Scale:
    """Factors on the configured learning rate (AdamW's or Muon's), weight decay and eps, for one parameter."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


class Optimizer:
    """AdamW on some tensors and Muon on others; all state is a flat dictionary of tensors."""

    def __init__(
        self, masters: MasterWeights, config: OptimizerConfig, parts: dict[str, tuple[int, ...]], scales: dict[str, Scale] | None = None
    ):
        self.config, self.masters = config, masters
        self.scales = {name: (scales or {}).get(name, Scale()) for name in masters.tensors}
        self.parts = parts if config.name == "muon" else {}
        self.num_updates = 0
        self.state: dict[str, torch.Tensor] = {}
        for name, tensor in masters.tensors.items():
            kinds = ("momentum",) if name in self.parts else ("exp_avg", "exp_avg_sq")
            self.state.update({f"{kind}/{name}": torch.zeros_like(tensor) for kind in kinds})

    @torch.no_grad()
    def step(self, grads: dict[str, torch.Tensor], lr_scale: float, workers: Any) -> None:
        """Update the master weights in place; `lr_scale` multiplies the peak rates."""
        self.num_updates += 1
        jobs: list[Callable[[], None]] = [lambda: self._adamw(grads, lr_scale)]
        jobs += [self._muon_job(grads, lr_scale, share) for share in self._muon_shares(workers.num_threads)]
        workers.map(lambda job: job(), jobs[::-1])

    def _adamw(self, grads: dict[str, torch.Tensor], lr_scale: float) -> None:
        config = self.config
        updates = torch.full((), float(self.num_updates), device=self.masters.device)
        groups = defaultdict(list)  # one call for all tensors with the same rates
        for name in grads:
            if name not in self.parts:
                decayed = self.masters.tensors[name].dim() >= 2 and "embed" not in name
                groups[decayed, self.scales[name]].append(name)
        for (decayed, scale), group in groups.items():
            torch._fused_adamw_(
                [self.masters.tensors[name] for name in group],
                [grads[name] for name in group],
                [self.state[f"exp_avg/{name}"] for name in group],
                [self.state[f"exp_avg_sq/{name}"] for name in group],
                [],
                [updates] * len(group),
                lr=config.lr * lr_scale * scale.lr,
                beta1=config.beta1,
                beta2=config.beta2,
                weight_decay=config.weight_decay * scale.weight_decay if decayed else 0.0,
                eps=config.eps * scale.eps,
                amsgrad=False,
                maximize=False,
            )

    def _muon_shares(self, num_shares: int) -> list[list[tuple[str, int, int]]]:
        """Split the matrices (name, first row, last row) into shares of like shapes and about equal work."""
        by_shape = defaultdict(list)
        for name, rows in self.parts.items():
            start = 0
            for count in rows:
                shape = tuple(sorted((count, self.masters.tensors[name].shape[1])))
                by_shape[shape].append((name, start, start + count))
                start += count
        shares = []
        for (rows, columns), group in by_shape.items():
            size = min(-(-len(group) // num_shares), max(1, STACK_ELEMENTS // (rows * columns)))
            shares += [group[i : i + size] for i in range(0, len(group), size)]
        return shares

    def _muon_job(self, grads, lr_scale: float, share) -> Callable[[], None]:
        def job() -> None:
            config = self.config
            buffers = [self.state[f"momentum/{name}"][a:b] for name, a, b in share]
            parts = [grads[name][a:b] for name, a, b in share]
            torch._foreach_lerp_(buffers, parts, 1.0 - config.momentum)
            directions = torch._foreach_lerp(parts, buffers, config.momentum)
            wide = torch.stack([x.T if x.shape[0] > x.shape[1] else x for x in directions])
            updates = orthogonalise(wide, config.newton_schulz_steps, self.masters.parameters[0].dtype)
            groups = defaultdict(list)  # one call for all matrices with the same rates
            for (name, a, b), update in zip(share, updates):
                weight = self.masters.tensors[name][a:b]
                groups[weight.shape, self.scales[name]].append((weight, update if update.shape == weight.shape else update.T))
            for ((rows, columns), scale), pairs in groups.items():
                lr = config.muon_lr * lr_scale * scale.lr
                weights, moves = zip(*pairs)
                torch._foreach_mul_(weights, 1.0 - lr * config.weight_decay * scale.weight_decay)
                torch._foreach_add_(weights, moves, alpha=-lr * max(1.0, rows / columns) ** 0.5)

        return job

    def load(self, state: dict[str, torch.Tensor], num_updates: int) -> None:
        """Take over saved state by name."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.num_updates = num_updates


def orthogonalise(matrices: torch.Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Move the singular values of a stack (N, rows <= columns) towards 1 by Newton-Schulz iterations in `dtype`.

    bf16 is enough where it is fast; a processor without units for it is many times faster in fp32.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (quintic coefficients).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.float()


def build_optimizer(masters: MasterWeights, config: OptimizerConfig, scales: dict[str, Scale] | None = None) -> Optimizer:
    """Make the optimizer for a model; the model says by `matrix_parts` which parameters Muon may take and how to cut them.

    `scales` gives factors by parameter name; a parameter that it does not name keeps the configured rates.
    """
    return Optimizer(masters, config, masters.model.matrix_parts(), scales)
