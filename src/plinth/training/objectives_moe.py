"""What a mixture of experts adds to its loss: an even load on the experts, small scores of the router."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from plinth.models.config import DecoderConfig
from plinth.ops.moe import Routing, expert_shares, load_balance_loss, load_entropy, router_z_loss

Sum = float | torch.Tensor


def add_router_losses(
    loss_sum: torch.Tensor, count: Sum, routings: Sequence[Routing], counted_N: torch.Tensor, config: DecoderConfig
) -> tuple[torch.Tensor, Sum, dict[str, Sum]]:
    """Return a loss of tokens with what its routers add, its count, and sums of metrics; each is a mean over the blocks with experts.

    `counted_N` are the positions whose prediction counts: padding moves nothing. The balance is that of a micro-batch, so it depends on
    how a step is cut into micro-batches, the one part of a loss that does; smaller ones ask for more evenness.
    Metrics: text_loss_nats (the loss of tokens alone), router_balance (1 is even, num_experts is all on one), router_z, load_entropy
    (1 is even, 0 is all on one), max_load (the busiest expert's tokens over those of an even load). No token is dropped.
    """
    balance, z = _mean_of_blocks(routings, load_balance_loss, counted_N), _mean_of_blocks(routings, router_z_loss, counted_N)
    shares = [expert_shares(routing, counted_N) for routing in routings]
    metrics = {
        "router_balance": balance.detach() / config.num_active_experts,
        "router_z": z.detach(),
        "load_entropy": torch.stack([load_entropy(share) for share in shares]).mean(),
        "max_load": torch.stack([share.max() * len(share) for share in shares]).mean(),
    }
    added = config.router_aux_loss * balance + config.router_z_loss * z
    sums: dict[str, Sum] = {name: value * count for name, value in metrics.items()}
    return loss_sum + added * count, count, {"text_loss_nats": loss_sum.detach().double(), **sums}


def _mean_of_blocks(
    routings: Sequence[Routing], loss: Callable[[Routing, torch.Tensor], torch.Tensor], counted_N: torch.Tensor
) -> torch.Tensor:
    return torch.stack([loss(routing, counted_N) for routing in routings]).mean()
