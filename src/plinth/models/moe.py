"""The feed-forward layer as a mixture of experts, of which each token uses a few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.models.mlp import BETWEEN, GatedFeedForward, Linear
from plinth.ops.linear import linear_rows
from plinth.ops.moe import Routing, gated_experts, gated_experts_rows, route


class MixtureOfExperts(nn.Module):
    """Gated experts behind a router, and where the configuration has one a shared expert that every token uses.

    The experts' matrices are stacked row-wise: `gate_up` (X 2 F, D), of each expert gate, then up; `down` (X D, F). They begin as a dense
    layer's do, and one expert alone is that dense layer.
    Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088; shared expert: Dai et al. 2024, arXiv:2401.06066,
    its gate: Qwen1.5-MoE.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        experts, width, size = config.num_experts, config.hidden_size, config.expert_size
        self.config = config
        self.router = Linear(width, experts)
        self.gate_up = Linear(width, experts * 2 * size)
        self.down = Linear(size, experts * width)
        self.between, self.between_rows = BETWEEN[config.activation]
        shared = config.shared_expert_intermediate_size
        self.shared = GatedFeedForward(width, shared, config.activation) if shared else None
        self.shared_gate = Linear(width, 1) if shared and config.shared_expert_gate else None

    def forward(self, x: torch.Tensor, routings: list[Routing] | None = None) -> torch.Tensor:
        """Return (..., D); what the router decided is appended to `routings`, for the losses that keep the load even."""
        x_ND = x.reshape(-1, x.shape[-1])
        routing = self._route(F.linear(x_ND, self.router.weight))
        if routings is not None:
            routings.append(routing)
        y = gated_experts(x_ND, routing, self.gate_up.weight, self.down.weight, self.between).view(x.shape)
        if self.shared is None:
            return y
        return y + self.shared(x) * (1.0 if self.shared_gate is None else _opening(F.linear(x, self.shared_gate.weight)))

    def forward_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        routing = self._route(linear_rows(x_ND, self.router.weight))
        y_ND = gated_experts_rows(x_ND, routing, self.gate_up.weight, self.down.weight, self.between_rows)
        if self.shared is None:
            return y_ND
        shared_ND = self.shared.forward_rows(x_ND)
        return y_ND + shared_ND * (1.0 if self.shared_gate is None else _opening(linear_rows(x_ND, self.shared_gate.weight)))

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the matrices by name, with the row counts of what is stacked in them; the router is no hidden matrix."""
        config = self.config
        parts = {
            "gate_up.weight": (config.expert_size,) * 2 * config.num_experts,
            "down.weight": (config.hidden_size,) * config.num_experts,
        }
        if self.shared is not None:
            parts |= {f"shared.{name}": rows for name, rows in self.shared.matrix_parts().items()}
        return parts

    def _route(self, logits_NX: torch.Tensor) -> Routing:
        return route(logits_NX, self.config.num_active_experts, renormalise=self.config.norm_topk_prob)


def _opening(scores: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid, written with the tanh, whose rounding does not depend on the place of a number in the tensor."""
    return 0.5 + 0.5 * torch.tanh(0.5 * scores)
