"""The plan that spreads a decoder over ranks, kept outside the model: tensor parallelism, sharded weights, recomputed activations.

Projections that the model fuses (queries, keys, values; gate, up) are matrices of their own here, so that each is cut evenly: a rank
multiplies with its rows of all of them in one product, whatever the number of ranks, and a checkpoint can be read by any other number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from plinth.config import UserError
from plinth.ops.linear import linear
from plinth.training.parallel import Ranks
from plinth.training.precision import DTYPES

# The dimension that tensor parallelism cuts, by the end of the module's name; every other parameter is held whole by each rank.
CUT = {"attention.qkv": 0, "mlp.gate_up": 0, "attention.out": 1, "mlp.down": 1, "embed": 0, "head": 0}
SEES_OWN_HEADS_ONLY = ("q_norm.weight", "k_norm.weight")  # whole on each rank, but with a gradient from its own heads
SCALES = ("norm.weight",)


class SplitLinear(nn.Module):
    """A linear layer whose matrix is kept in parts, one for each projection fused in it; it multiplies with all at once."""

    def __init__(self, rows: tuple[int, ...], in_features: int, device: torch.device):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.empty(count, in_features, device=device)) for count in rows)

    @property
    def weight(self) -> torch.Tensor:
        """This rank's rows of all parts, end to end."""
        return torch.cat([part.to_local() if isinstance(part, DTensor) else part for part in self.parts])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


class SplitColumns(ParallelStyle):
    """Give each rank its rows of every part of a `SplitLinear`: its own heads, or its own features."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for i, part in enumerate(module.parts):
            module.parts[i] = nn.Parameter(distribute_tensor(part.data, device_mesh, [Shard(0)], src_data_rank=None))
        module.register_forward_pre_hook(lambda _, inputs: (_shared_input(inputs[0], device_mesh),))
        return module


class SplitRows(ParallelStyle):
    """Give each rank the columns of a linear layer that meet its own heads or features; the results are summed over the ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.weight.data, device_mesh, [Shard(1)], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))

        def forward(x: torch.Tensor) -> torch.Tensor:
            share = DTensor.from_local(linear(x, module.weight.to_local()), device_mesh, [Partial()], run_check=False)
            return share.redistribute(placements=[Replicate()]).to_local()

        module.forward = forward
        return module


class VocabularyRows(ParallelStyle):
    """Give each rank its rows of the output head; the loss multiplies with them (see ops/vocab_parallel.py)."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.weight.data, device_mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(weight))
        return module


def _shared_input(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return x, the same on all ranks of the mesh; its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def shard_model(model: nn.Module, ranks: Ranks, dtype: str, weights: Iterable[tuple[str, torch.Tensor]]) -> nn.Module:
    """Spread a decoder that lies on the meta device over the ranks, and fill in `weights`; returns the same module.

    `weights` gives (name, whole fp32 tensor) in any order, one at a time: no rank holds more than its shards and one tensor.
    The shards are fp32; a block's weights are gathered in `dtype` while it computes. Raises UserError when tensor parallelism does not
    divide the heads or the features.
    """
    check_divisible(model, ranks.tp)
    splits = split_projections(model)
    if ranks.tp > 1:
        parallelize_module(model, ranks.mesh["tp"], _plan(model))
    checkpoint_blocks(model, ranks.config.activation_checkpointing)
    mesh = ranks.mesh["dp_shard"] if ranks.replicas == 1 else ranks.mesh["dp_replicate", "dp_shard"]
    computed = None if dtype == "float32" else DTYPES[dtype]
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=DTYPES[ranks.config.reduce_dtype])
    for block in model.layers:
        _sum_gradients(fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=ranks.shards > 1))
    _sum_gradients(fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False))  # the loss uses the head after forward
    model.to_empty(device=ranks.device)
    fill(dict(model.named_parameters()), splits, ranks, weights)
    return model


def _sum_gradients(module: nn.Module) -> None:
    """Let the ranks' gradients be summed, not averaged: losses are sums, and one place divides by the count of all."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def check_divisible(model: nn.Module, tp: int) -> None:
    """Raise UserError for a decoder with extras, and unless `tp` ranks get whole heads and equal numbers of features."""
    if model.config.extras:
        raise UserError(
            f"{', '.join(model.config.extras)}: training on several processes does not know these options of the model. "
            "Leave them out, or train on one process."
        )
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        value = getattr(model.config, name)
        if value % tp:
            raise UserError(f"model.{name}={value} is not a multiple of parallel.tp={tp}. Use a divisor of {value}, or change the model.")
    known = (*(f"{module}.weight" for module in CUT), *SCALES)
    strange = [name for name, _ in model.named_parameters() if not name.endswith(known)]
    if strange and tp > 1:
        raise UserError(
            f"parallel.tp={tp}: no plan says how to cut {strange[0]}. Use parallel.tp=1, or leave out the model option behind it."
        )


def split_projections(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Replace the model's fused projections by `SplitLinear`; return {name of the fused matrix: rows of its parts}."""
    splits = {name: rows for name, rows in model.matrix_parts().items() if len(rows) > 1}
    for name, rows in splits.items():
        path, _, attribute = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        fused = getattr(parent, attribute)
        setattr(parent, attribute, SplitLinear(rows, fused.in_features, fused.weight.device))
    return splits


def _plan(model: nn.Module) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {"embed": RowwiseParallel(input_layouts=Replicate())}
    if model.head is not None:
        plan["head"] = VocabularyRows()
    for i in range(len(model.layers)):
        for name in ("attention.qkv", "mlp.gate_up"):
            plan[f"layers.{i}.{name}"] = SplitColumns()
        for name in ("attention.out", "mlp.down"):
            plan[f"layers.{i}.{name}"] = SplitRows()
    return plan


def checkpoint_blocks(model: nn.Module, mode: str) -> None:
    """Let each block keep less for the backward pass and compute the rest again: `none`, `block` or `selective`."""
    if mode == "none":
        return
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_products)} if mode == "selective" else {}
    for block in model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def _keep_products(context, operation, *_, **__) -> CheckpointPolicy:
    """Keep the projections' results; attention, norms and gates are computed again."""
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE


def part_name(fused: str, index: int) -> str:
    """Return the name of a part of a fused matrix."""
    return f"{fused.removesuffix('weight')}parts.{index}"


def fused_name(name: str) -> tuple[str, int | None]:
    """Return the model's own name of a parameter, and which part of it this is (None: all of it)."""
    path, _, index = name.rpartition(".parts.")
    return (f"{path}.weight", int(index)) if path else (name, None)


def cut_dimension(name: str) -> int | None:
    """Return the dimension of a parameter that tensor parallelism cuts, None where each rank holds it whole."""
    module = fused_name(name)[0].removesuffix(".weight")
    return next((dim for end, dim in CUT.items() if module == end or module.endswith("." + end)), None)


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return (start, stop) of one of the pieces that torch.chunk cuts; late pieces may be shorter or empty."""
    step = -(-size // parts)
    return min(size, index * step), min(size, (index + 1) * step)


def block_of(name: str, shape: torch.Size, shards: int, tp: int, member: int) -> tuple[slice, ...]:
    """Return which block of a whole parameter the rank `member` of a copy holds.

    Tensor parallelism cuts first; of what it leaves, the shards are cut along the first dimension.
    """
    bounds = [(0, size) for size in shape]
    shard_rank, tp_rank = divmod(member, tp)
    dim = cut_dimension(name)
    if dim is not None:
        bounds[dim] = chunk(shape[dim], tp, tp_rank)
    start, stop = bounds[0]
    first, last = chunk(stop - start, shards, shard_rank)
    bounds[0] = (start + first, start + last)
    return tuple(slice(a, b) for a, b in bounds)


def num_elements(block: tuple[slice, ...]) -> int:
    """Return the number of elements of a block."""
    count = 1
    for part in block:
        count *= part.stop - part.start
    return count


@torch.no_grad()
def fill(parameters: dict[str, Any], splits: dict[str, tuple[int, ...]], ranks: Ranks, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy this rank's blocks of whole tensors, given under the model's own names, into its shards."""
    missing = set(parameters)
    for name, tensor in parts_of(weights, splits):
        local = parameters[name].to_local()
        local.copy_(tensor[block_of(name, tensor.shape, ranks.shards, ranks.tp, ranks.copy_rank)])
        missing.discard(name)
    assert not missing, f"no weights were given for {sorted(missing)[:3]}"


def parts_of(tensors: Iterable[tuple[str, torch.Tensor]], splits: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors under the sharded model's names: fused matrices part by part, as views."""
    for name, tensor in tensors:
        if name in splits:
            yield from ((part_name(name, i), part) for i, part in enumerate(tensor.split(splits[name])))
        else:
            yield name, tensor
