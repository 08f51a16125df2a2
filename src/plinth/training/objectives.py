"""Losses in front of the training step: each returns a sum, a count, and sums of further metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plinth.ops.loss import linear_cross_entropy, token_log_probs
from plinth.ops.moe import Routing
from plinth.training.objectives_moe import add_router_losses

ROW_STEP = 128  # the head runs on multiples of it: few shapes, so kernels and memory are used again


def padded_rows(count: int) -> int:
    """Return the smallest multiple of ROW_STEP that holds `count` rows."""
    return -(-count // ROW_STEP) * ROW_STEP


def select_rows(counted_N: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions that are counted, filled up with uncounted ones to a multiple of ROW_STEP."""
    order = torch.argsort(counted_N.to(torch.int8), descending=True, stable=True)
    return order[: padded_rows(count)]


def causal_lm_loss(model: nn.Module, batch: tuple[torch.Tensor, ...], dynamic: bool = False, embedded_BTD: torch.Tensor | None = None):
    """Return the next-token cross-entropy; the batch is (inputs (B, T), targets (B, T)), targets below 0 do not count.

    A third tensor gives the segments (B, T) that attention keeps to, or the images of a decoder that sees. Where the model has
    experts, what keeps their load even is added. With `dynamic` it is Σ −p log p with p held fixed, which follows surprising tokens less,
    and the metric nll_nats has the cross-entropy. `embedded_BTD` takes the place of the inputs' embeddings.
    On a CPU the output head runs on counted positions only, but for the filling up to a multiple of ROW_STEP. On a GPU
    it runs on all: how many are counted is known there alone, and asking would make it idle.
    Source of the dynamic loss: Wu et al. 2025 (DFT), arXiv:2508.05629.
    """
    inputs_BT, targets_BT, *others = batch
    config = getattr(model.config, "decoder", model.config)
    cap = config.logit_softcap
    routings: list[Routing] = []
    more: dict[str, Any] = {"routings": routings} if config.num_experts else {}
    if embedded_BTD is not None:
        more["embedded_BTD"] = embedded_BTD
    hidden_ND = model(inputs_BT, *others, **more).flatten(0, 1)
    targets_N = targets_BT.flatten()
    counted_N = targets_N >= 0
    on_cpu = targets_N.device.type == "cpu"
    count = int(counted_N.sum()) if on_cpu else counted_N.sum(dtype=torch.float64)
    if on_cpu and padded_rows(count) < targets_N.numel():
        rows = select_rows(counted_N, count)
        hidden_ND, targets_N = hidden_ND[rows], targets_N[rows]
    if not dynamic:
        loss, metrics = linear_cross_entropy(hidden_ND, model.output_weight, targets_N, cap), {}
    else:
        log_probs_N = token_log_probs(hidden_ND, model.output_weight, targets_N, cap)
        fixed_N = log_probs_N.detach()
        loss, metrics = -(fixed_N.exp() * log_probs_N).sum(), {"nll_nats": -fixed_N.sum()}
    if routings:
        loss, count, more_metrics = add_router_losses(loss, count, routings, counted_N, config)
        metrics = metrics | more_metrics
    return loss, count, metrics
