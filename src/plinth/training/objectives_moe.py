"""What a mixture of experts adds to its loss: an even load on the experts, small scores of the router."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from plinth.ops.moe import Population, Routing, expert_shares, load_balance_loss, load_entropy, router_z_loss


def router_losses(
    routings: Sequence[Routing], counted_N: Population, *, balance_coef: float, z_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what is added to the mean loss, in nats, and the metrics, all averaged over the layers.

    `counted_N` are the positions whose prediction counts: padding moves nothing. The balance is that of a micro-batch: how its loss
    falls depends on how a step is cut into micro-batches, the one part of a loss that does; smaller ones ask for more evenness.
    Metrics: router_balance (1 is even, num_experts is all on one), router_z, load_entropy (1 is even, 0 is all on one), max_load (the
    busiest expert's tokens over those of an even load). No expert has a capacity, so no token is dropped.
    """
    balance, z = _layer_mean(routings, load_balance_loss, counted_N), _layer_mean(routings, router_z_loss, counted_N)
    shares = [expert_shares(routing, counted_N) for routing in routings]
    metrics = {
        "router_balance": balance.detach() / routings[0].experts_NC.shape[-1],
        "router_z": z.detach(),
        "load_entropy": torch.stack([load_entropy(share) for share in shares]).mean(),
        "max_load": torch.stack([share.max() * len(share) for share in shares]).mean(),
    }
    return balance_coef * balance + z_coef * z, metrics


def _layer_mean(routings, loss, counted_N) -> torch.Tensor:
    return torch.stack([loss(routing, counted_N) for routing in routings]).mean()
