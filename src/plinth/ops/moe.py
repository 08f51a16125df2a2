"""Mixtures of experts: which experts a token goes to, and the products of each expert with all of its tokens at once.

N tokens each choose C of X experts. The N C assignments are sorted by expert into M rows, so that an expert's tokens lie side by side
and its matrices are multiplied once. Weights of experts are stacked along the first dimension: (X F, D) is X matrices of (F, D).
No expert has a capacity: no token is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from plinth.ops.linear import ROW_TILE, linear_rows
from plinth.ops.swiglu import swiglu

BF16_TILE = 32
"""rows that bf16 groups are filled up to on a CPU: its library compiles a kernel for every new number of rows, which takes longer than
the product; few different numbers come again"""


@dataclass(frozen=True)
class Routing:
    """What a router decided for N tokens."""

    logits_NX: torch.Tensor
    """the router's scores, in the model's dtype"""
    experts_NC: torch.Tensor
    """the chosen experts of each token, the likeliest first"""
    weights_NC: torch.Tensor
    """what the chosen experts' outputs are multiplied by, fp32"""


def route(logits_NX: torch.Tensor, num_active: int, *, renormalise: bool = True) -> Routing:
    """Choose the `num_active` likeliest experts of each token.

    The weights are probabilities under the softmax over all experts, in fp32; renormalised, those chosen sum to 1.
    Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.1; Jiang et al. 2024, arXiv:2401.04088, section 2.1 (renormalised).
    Differs: no noise.
    """
    weights_NC, experts_NC = torch.topk(torch.softmax(logits_NX.float(), -1), num_active, dim=-1)
    if renormalise:
        weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)
    return Routing(logits_NX, experts_NC, weights_NC)


@dataclass(frozen=True)
class Groups:
    """Assignments sorted by expert, each expert's rows filled up to a multiple of a tile."""

    source_M: torch.Tensor
    """the token of each row; of rows that only fill, any token"""
    place_NC: torch.Tensor
    """the row of each assignment"""
    ends_X: torch.Tensor
    """the row after each expert's last, int32"""

    def bounds(self) -> list[tuple[int, int]]:
        """Return (first row, row after the last) of each expert; waits for a GPU."""
        ends = self.ends_X.tolist()
        return list(zip([0, *ends], ends))


def group(experts_NC: torch.Tensor, num_experts: int, tile: int = 1) -> Groups:
    """Sort the assignments by expert, within an expert by token.

    With a tile above 1 the number of rows depends on the choices, and a GPU is waited for.
    """
    N, C = experts_NC.shape
    by_expert, order = torch.sort(experts_NC.flatten(), stable=True)
    counts_X = torch.bincount(by_expert, minlength=num_experts) if by_expert.device.type == "cpu" else _counts(by_expert, num_experts)
    if tile == 1:
        rows, num_rows = torch.arange(N * C, device=order.device), N * C
        ends_X = counts_X.cumsum(0)
    else:
        ends_X = (-(-counts_X // tile) * tile).cumsum(0)
        shift_X = ends_X - (-(-counts_X // tile) * tile) - (counts_X.cumsum(0) - counts_X)
        rows, num_rows = torch.arange(N * C, device=order.device) + shift_X[by_expert], int(ends_X[-1])
    source_M = order // C if tile == 1 else order.new_zeros(num_rows).index_copy(0, rows, order // C)
    place_NC = torch.empty_like(order).index_copy(0, order, rows).view(N, C)
    return Groups(source_M, place_NC, ends_X.to(torch.int32))


def _counts(sorted_A: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how often each number occurs among sorted ones, on the device: bincount would wait for a GPU."""
    edges = torch.searchsorted(sorted_A, torch.arange(num_experts + 1, device=sorted_A.device))
    return edges.diff()


class _Dispatch(torch.autograd.Function):
    """Rows of tokens in the order of experts; the backward pass gathers, where that of an index adds to scattered places."""

    @staticmethod
    def forward(ctx, x_ND, source_M, place_NC):
        ctx.save_for_backward(place_NC)
        return x_ND.index_select(0, source_M)

    @staticmethod
    def backward(ctx, grad_MD):
        (place_NC,) = ctx.saved_tensors
        return _sum_rows(grad_MD.contiguous(), place_NC, None), None, None


class _Combine(torch.autograd.Function):
    """Each token's rows back again, weighted and summed."""

    @staticmethod
    def forward(ctx, y_MD, weights_NC, source_M, place_NC):
        ctx.save_for_backward(y_MD, weights_NC, source_M, place_NC)
        return _sum_rows(y_MD, place_NC, weights_NC)

    @staticmethod
    def backward(ctx, grad_ND):
        y_MD, weights_NC, source_M, place_NC = ctx.saved_tensors
        grad_MD = grad_ND.index_select(0, source_M)
        dots_M = torch.linalg.vecdot(y_MD, grad_MD)
        weights_M = torch.zeros(len(y_MD), dtype=y_MD.dtype, device=y_MD.device)
        weights_M[place_NC.flatten()] = weights_NC.flatten().to(y_MD.dtype)
        return grad_MD.mul_(weights_M[:, None]), dots_M[place_NC].to(weights_NC.dtype), None, None


def _sum_rows(y_MD: torch.Tensor, place_NC: torch.Tensor, weights_NC: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of each token's C rows, weighted or not, (N, D)."""
    if weights_NC is not None:
        weights_NC = weights_NC.to(y_MD.dtype)
    return F.embedding_bag(place_NC, y_MD, per_sample_weights=weights_NC, mode="sum")


class _GroupedLinear(torch.autograd.Function):
    """One product an expert, each written to its place in the result."""

    @staticmethod
    def forward(ctx, x_MD, weight_XFD, bounds):
        ctx.save_for_backward(x_MD, weight_XFD)
        ctx.bounds = bounds
        y_MF = x_MD.new_empty(len(x_MD), weight_XFD.shape[1])
        for weight_FD, (start, stop) in zip(weight_XFD, bounds):
            if stop > start:
                torch.mm(x_MD[start:stop], weight_FD.t(), out=y_MF[start:stop])
        return y_MF

    @staticmethod
    def backward(ctx, grad_MF):
        x_MD, weight_XFD = ctx.saved_tensors
        grad_MF = grad_MF.contiguous()
        wanted_x, wanted_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_MD) if wanted_x else None
        grad_weight = torch.empty_like(weight_XFD) if wanted_weight else None
        for i, (start, stop) in enumerate(ctx.bounds):
            if stop > start and wanted_x:
                torch.mm(grad_MF[start:stop], weight_XFD[i], out=grad_x[start:stop])
            if wanted_weight and stop > start:
                torch.mm(grad_MF[start:stop].t(), x_MD[start:stop], out=grad_weight[i])
            elif wanted_weight:
                grad_weight[i].zero_()
        return grad_x, grad_weight, None


def grouped_linear(x_MD: torch.Tensor, weight: torch.Tensor, groups: Groups, bounds: list[tuple[int, int]] | None) -> torch.Tensor:
    """Return each row times its expert's matrix, transposed, (M, F); `weight` is (X F, D).

    Without bounds, on a GPU, PyTorch's grouped product takes them from the device, and nothing waits.
    """
    weight_XFD = weight.view(len(groups.ends_X), -1, weight.shape[1])
    if bounds is None:
        return F.grouped_mm(x_MD, weight_XFD.transpose(1, 2), offs=groups.ends_X)
    return _GroupedLinear.apply(x_MD, weight_XFD, bounds)


Between = Callable[[torch.Tensor], torch.Tensor]
"""what is between an expert's matrices: (M, 2 F), gate and up, to (M, F)"""


def gated_experts(
    x_ND: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor, between: Between = swiglu
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, (N, D): down(silu(gate(x)) * up(x)) is an expert, unless `between` is another.

    `gate_up` is (X 2 F, D), of each expert gate, then up; `down` is (X D, F). The slow twin is `looped_experts`.
    """
    num_experts = routing.logits_NX.shape[-1]
    on_cpu_bf16 = x_ND.device.type == "cpu" and x_ND.dtype is torch.bfloat16
    groups = group(routing.experts_NC, num_experts, BF16_TILE if on_cpu_bf16 else 1)
    bounds = None if _stays_on_device(x_ND, down) else groups.bounds()
    x_MD = _Dispatch.apply(x_ND, groups.source_M, groups.place_NC)
    y_MD = grouped_linear(between(grouped_linear(x_MD, gate_up, groups, bounds)), down, groups, bounds)
    return _Combine.apply(y_MD, routing.weights_NC, groups.source_M, groups.place_NC)


def _stays_on_device(x_ND: torch.Tensor, down: torch.Tensor) -> bool:
    """Return whether PyTorch's grouped product takes these: bf16 on a GPU, rows of whole 16 bytes."""
    return x_ND.device.type != "cpu" and x_ND.dtype is torch.bfloat16 and x_ND.shape[1] % 8 == 0 and down.shape[1] % 8 == 0


def looped_experts(
    x_ND: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor, between: Between = swiglu
) -> torch.Tensor:
    """Do what `gated_experts` does as the definition has it: every expert looks for its tokens."""
    num_experts = routing.logits_NX.shape[-1]
    total_ND = torch.zeros_like(x_ND)
    for x, (gate_up_FD, down_DF) in enumerate(zip(gate_up.chunk(num_experts), down.chunk(num_experts))):
        tokens, choices = torch.where(routing.experts_NC == x)
        y = F.linear(between(F.linear(x_ND[tokens], gate_up_FD)), down_DF)
        weighted = y * routing.weights_NC[tokens, choices, None].to(x_ND.dtype)
        total_ND = total_ND.index_add(0, tokens, weighted)
    return total_ND


def gated_experts_rows(
    x_ND: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor, between: Between = swiglu
) -> torch.Tensor:
    """Do what `gated_experts` does, each row independent of its company bit for bit: every expert's rows go in whole tiles."""
    num_experts = routing.logits_NX.shape[-1]
    groups = group(routing.experts_NC, num_experts, ROW_TILE)
    x_MD = x_ND.index_select(0, groups.source_M)
    parts = []
    for (start, stop), gate_up_FD, down_DF in zip(groups.bounds(), gate_up.chunk(num_experts), down.chunk(num_experts)):
        if stop > start:
            parts.append(linear_rows(between(linear_rows(x_MD[start:stop], gate_up_FD)), down_DF))
    y_MD = torch.cat(parts)
    weights_NC = routing.weights_NC.to(y_MD.dtype)
    total_ND = y_MD[groups.place_NC[:, 0]] * weights_NC[:, :1]
    for c in range(1, weights_NC.shape[1]):  # one after the other: a sum's own order of additions may change with the number of rows
        total_ND = total_ND + y_MD[groups.place_NC[:, c]] * weights_NC[:, c : c + 1]
    return total_ND


Population = torch.Tensor | None
"""which of N tokens are meant, bool (N,); None means all"""


def expert_shares(routing: Routing, counted_N: Population = None) -> torch.Tensor:
    """Return what share of the assignments each expert gets, fp32 (X,), summing to 1."""
    experts_NC, num_experts = routing.experts_NC, routing.logits_NX.shape[-1]
    ones = torch.ones_like(experts_NC, dtype=torch.float32)
    if counted_N is not None:
        ones = ones * counted_N[:, None]
    counts_X = torch.zeros(num_experts, device=ones.device).index_add(0, experts_NC.flatten(), ones.flatten())
    return counts_X / counts_X.sum().clamp_min(1.0)


def load_balance_loss(routing: Routing, counted_N: Population = None) -> torch.Tensor:
    """Return X C sum_x share_x probability_x, fp32: C where the load is even, up to X C where one expert gets all.

    The shares have no gradient; the mean probabilities have.
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4-6.
    Differs: for C experts a token, times C, as transformers has it, so that published coefficients keep their meaning.
    """
    probabilities_NX = torch.softmax(routing.logits_NX.float(), -1)
    shares_X = expert_shares(routing, counted_N)
    scale = routing.logits_NX.shape[-1] * routing.experts_NC.shape[-1]
    return scale * (shares_X * _mean(probabilities_NX, counted_N)).sum()


def router_z_loss(routing: Routing, counted_N: Population = None) -> torch.Tensor:
    """Return the mean of logsumexp(router's scores)², fp32: it keeps the scores small.

    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.  Differs: none.
    """
    return _mean(torch.logsumexp(routing.logits_NX.float(), -1).square(), counted_N)


def load_entropy(shares_X: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the shares over that of an even load: 1 is even, 0 is all on one expert."""
    if len(shares_X) == 1:
        return torch.ones((), device=shares_X.device)
    return torch.special.entr(shares_X).sum() / math.log(len(shares_X))


def _mean(values_N: torch.Tensor, counted_N: Population) -> torch.Tensor:
    """Return the mean over the counted tokens, 0 where there are none."""
    if counted_N is None:
        return values_N.mean(0)
    weights_N = counted_N.to(values_N.dtype).view(-1, *[1] * (values_N.dim() - 1))
    return (values_N * weights_N).sum(0) / weights_N.sum().clamp_min(1.0)
