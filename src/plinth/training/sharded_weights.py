"""Master weights spread over ranks: what `MasterWeights` is to one process, for a model that `shard_model` has spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plinth.training.device import move_batch
from plinth.training.muon import Quintic, orthogonalise
from plinth.training.parallel import Ranks, balanced, padded
from plinth.training.precision import DTYPES
from plinth.training.sharding import SEES_OWN_HEADS_ONLY, block_of, cut_dimension, fused_name, num_elements


class ShardedWeights:
    """This rank's shards of the fp32 weights; FSDP casts them while a block computes, so nothing is published.

    `tensors` are the shards by name, `shapes` those of the whole parameters.
    """

    def __init__(self, model: nn.Module, dtype: str, ranks: Ranks):
        self.model, self.ranks, self.compute_dtype = model, ranks, DTYPES[dtype]
        self.device = ranks.device
        named: list[tuple[str, Any]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.tensors = {name: p.detach().to_local() for name, p in named}
        self.shapes = {name: torch.Size(p.shape) for name, p in named}
        self._owners: list[list[str]] | None = None

    def publish(self, workers: Any = None) -> None:
        """Do nothing: the model computes with these shards."""

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank, alike on all."""
        return self.ranks.any(flag)[0]

    def finish(self) -> None:
        """Do nothing: the whole model is put together by `gather_into`."""

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by name; here each projection is a matrix of its own."""
        hidden = set(self.model.matrix_parts())
        return {name: (self.shapes[name][0],) for name in self.names if fused_name(name)[0] in hidden}

    def plain_name(self, name: str) -> str:
        """Return the model's own name of the tensor that this one is, or is a part of."""
        return fused_name(name)[0]

    def block(self, name: str, member: int | None = None) -> tuple[slice, ...]:
        """Return which block of a whole parameter this rank, or another of its copy, holds."""
        ranks = self.ranks
        return block_of(name, self.shapes[name], ranks.shards, ranks.tp, ranks.copy_rank if member is None else member)

    def gradients(self, loss_function, batches: Sequence[Any]) -> tuple[float, float, dict[str, float], list[torch.Tensor]]:
        """Return loss sum, count, metric sums over all ranks, and this rank's shards of the gradient of the loss sum.

        Gradients add up on each rank over the micro-batches and are summed over ranks once, beside the last backward pass.
        """
        loss_sum, count, sums = 0.0, 0.0, {}
        for i, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(i + 1 == len(batches))
            loss, batch_count, metrics = loss_function(self.model, move_batch(batch, self.device))
            loss.backward()
            loss_sum, count = loss_sum + float(loss.detach()), count + float(batch_count)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        keys = sorted(sums)
        loss_sum, count, *totals = self.ranks.sum([loss_sum, count, *(sums[key] for key in keys)])
        return loss_sum, count, dict(zip(keys, totals)), self._take_gradients()

    def _take_gradients(self) -> list[torch.Tensor]:
        grads = []
        for name, parameter in zip(self.names, self.parameters):
            grad: Any = parameter.grad
            grad = torch.zeros_like(self.tensors[name]) if grad is None else grad.to_local().float()
            if self.ranks.tp > 1 and name.endswith(SEES_OWN_HEADS_ONLY):
                dist.all_reduce(grad, group=self.ranks.tp_group)
            parameter.grad = None
            grads.append(grad)
        return grads

    def norm(self, grads: Sequence[torch.Tensor], workers: Any = None) -> float:
        """Return the norm of the whole gradient, alike on all ranks; what tensor-parallel ranks hold alike counts once."""
        squares = 0.0
        for name, grad in zip(self.names, grads):
            if cut_dimension(name) is not None or self.ranks.tp_rank == 0:
                squares += float(torch.linalg.vector_norm(grad)) ** 2
        return (self.ranks.sum([squares])[0] * self.ranks.tp / self.ranks.replicas) ** 0.5

    def orthogonalise(self, directions: dict[str, torch.Tensor], quintics: tuple[Quintic, ...]) -> dict[str, torch.Tensor]:
        """Return this rank's shards of the orthogonalised matrices, given its shards of the directions.

        Each matrix is put together on one rank, which iterates, and cut up again; the ranks' shares of the work are about equal. Shards
        travel in the compute dtype, in which the iteration runs anyway; a rank sends and gets about its own shards' size, twice.
        """
        ranks = self.ranks
        if self._owners is None:
            costs = {name: float(self.shapes[name].numel() * min(self.shapes[name])) for name in directions}
            self._owners = balanced(costs, ranks.world_size)
        first = ranks.replica * ranks.copy_size
        owned = self._owners[first : first + ranks.copy_size]  # by the ranks of this copy
        mine = owned[ranks.copy_rank]
        sent = {name: directions[name].to(self.compute_dtype) for names in owned for name in names}
        whole = self._collect(sent, owned, mine)
        updates = self._spread(_orthogonalise_stacks(whole, quintics, self.compute_dtype), owned, mine)
        return {name: update.float() for name, update in self._share_between_copies(updates).items()}

    def _sizes(self, names: Sequence[str], member: int) -> int:
        return sum(num_elements(self.block(name, member)) for name in names)

    def _collect(self, shards: dict[str, torch.Tensor], owned: list[list[str]], mine: list[str]) -> dict[str, torch.Tensor]:
        """Send each owner in this copy its matrices' shards; return the whole matrices that this rank owns."""
        ranks = self.ranks
        to_owner = [self._sizes(names, ranks.copy_rank) for names in owned]
        from_member = [self._sizes(mine, member) for member in range(ranks.copy_size)]
        received = self._exchange([shards[name] for names in owned for name in names], to_owner, from_member)
        whole = {name: received.new_empty(self.shapes[name]) for name in mine}
        for member, piece in enumerate(received.split(from_member)):
            blocks = [self.block(name, member) for name in mine]
            for name, block, values in zip(mine, blocks, piece.split([num_elements(block) for block in blocks])):
                whole[name][block] = values.view(whole[name][block].shape)
        return whole

    def _spread(self, whole: dict[str, torch.Tensor], owned: list[list[str]], mine: list[str]) -> dict[str, torch.Tensor]:
        """Undo `_collect`: return this rank's shards of the matrices that any rank of its copy owns."""
        ranks = self.ranks
        to_member = [self._sizes(mine, member) for member in range(ranks.copy_size)]
        from_owner = [self._sizes(names, ranks.copy_rank) for names in owned]
        pieces = [whole[name][self.block(name, member)] for member in range(ranks.copy_size) for name in mine]
        return self._unpack(self._exchange(pieces, to_member, from_owner), [name for names in owned for name in names])

    def _exchange(self, pieces: list[torch.Tensor], to: list[int], come: list[int]) -> torch.Tensor:
        like = torch.empty(0, dtype=self.compute_dtype, device=self.ranks.device)
        received = like.new_empty(sum(come))
        dist.all_to_all_single(received, padded(pieces, sum(to), like), come, to, group=self.ranks.copy_group)
        return received

    def _unpack(self, flat: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        sizes = [num_elements(self.block(name)) for name in names]
        return {name: part.view(self.tensors[name].shape) for name, part in zip(names, flat[: sum(sizes)].split(sizes))}

    def _share_between_copies(self, updates: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the shards of all matrices: those that this copy's ranks worked out, and those of the other copies'."""
        ranks = self.ranks
        if ranks.replicas == 1:
            return updates
        assert self._owners is not None
        by_copy = [
            [name for names in self._owners[r * ranks.copy_size : (r + 1) * ranks.copy_size] for name in names]
            for r in range(ranks.replicas)
        ]
        size = max(self._sizes(names, ranks.copy_rank) for names in by_copy)
        like = torch.empty(0, dtype=self.compute_dtype, device=ranks.device)
        own = padded([updates[name] for name in by_copy[ranks.replica]], size, like)
        everyone = [like.new_empty(size) for _ in by_copy]
        dist.all_gather(everyone, own, group=ranks.replica_group)
        shared: dict[str, torch.Tensor] = {}
        for names, flat in zip(by_copy, everyone):
            shared |= self._unpack(flat, names)
        return shared

    def whole_tensors(self, shards: dict[str, torch.Tensor] | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Give (name, whole fp32 tensor on the CPU) of each parameter on the leader, None elsewhere; all ranks must go through it.

        `shards` are those of another quantity with the same layout, by default the weights.
        """
        ranks = self.ranks
        for name, shard in (self.tensors if shards is None else shards).items():
            blocks = [self.block(name, member) for member in range(ranks.copy_size)]
            size = max(map(num_elements, blocks))
            pieces = [shard.new_empty(size) for _ in blocks] if ranks.copy_rank == 0 else None
            dist.gather(padded([shard], size, shard), pieces, dst=ranks.replica * ranks.copy_size, group=ranks.copy_group)
            if not ranks.is_leader:
                yield name, None
                continue
            whole = shard.new_empty(self.shapes[name])
            for block, piece in zip(blocks, pieces):
                whole[block] = piece[: num_elements(block)].view(whole[block].shape)
            yield name, whole.cpu()

    def gather_into(self, model: nn.Module | None) -> None:
        """Copy the whole weights into the leader's `model`, one process's plain model of the same shape; all ranks must call it."""
        target = {} if model is None else dict(model.named_parameters())
        rows = {} if model is None else model.matrix_parts()
        with torch.no_grad():
            for name, whole in self.whole_tensors():
                if whole is not None:
                    fused, index = fused_name(name)
                    place = target[fused] if index is None else target[fused].split(rows[fused])[index]
                    place.copy_(whole)

    def held_bytes(self) -> int:
        """Return the bytes of this rank's shards of the weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def _orthogonalise_stacks(matrices: dict[str, torch.Tensor], quintics: tuple[Quintic, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Orthogonalise whole matrices, those of one shape in one batch."""
    by_shape = defaultdict(list)
    for name, matrix in matrices.items():
        by_shape[matrix.shape].append(name)
    done: dict[str, torch.Tensor] = {}
    for names in by_shape.values():
        done |= zip(names, orthogonalise(torch.stack([matrices[name] for name in names]), quintics, dtype))
    return done
