"""Many processes as one: how the work is cut, and what the processes agree on; the weights' shards are in sharding.py.

Each process is a rank. The ranks form a mesh of three dimensions: replicas of the sharded weights, shards of one replica, and tensor
parallelism within a shard. Ranks that differ in the first two get different rows of a step (data parallelism); ranks that differ only in
the third get the same rows and share every matrix product.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from plinth.config import UserError


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the work; dp_replicate x dp_shard x tp is their number (WORLD_SIZE)."""

    dp_replicate: int = 1
    """copies of the sharded weights; gradients are summed over them (with dp_shard above 1: hybrid sharding)"""
    dp_shard: int | None = None
    """processes that hold one copy together, each a shard (default: WORLD_SIZE / (dp_replicate x tp))"""
    tp: int = 1
    """processes that share each matrix product (tensor parallelism); divides num_heads, num_kv_heads and intermediate_size"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which gradients are summed over processes"""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """block: keep each block's input and compute the rest again for the backward pass; selective: keep matrix products too"""
    timeout_s: float = 600.0
    """seconds that a process waits for the others before it gives up"""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "tp"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"parallel.{name}={getattr(self, name)} must be at least 1.")
        if self.timeout_s <= 0:
            raise UserError(f"parallel.timeout_s={self.timeout_s} must be positive.")

    def degrees(self, world_size: int) -> tuple[int, int, int]:
        """Return (replicas, shards, tensor-parallel). Raises UserError when their product is not `world_size`."""
        fixed = self.dp_replicate * self.tp
        shard = self.dp_shard if self.dp_shard is not None else max(1, world_size // fixed)
        if fixed * shard != world_size:
            raise UserError(
                f"parallel.dp_replicate={self.dp_replicate} x parallel.dp_shard={shard} x parallel.tp={self.tp} "
                f"= {fixed * shard} processes, "
                f"but WORLD_SIZE={world_size}. Launch `torchrun --nproc-per-node {fixed * shard} -m plinth ...`, or change the degrees."
            )
        return self.dp_replicate, shard, self.tp


class Ranks:
    """This process among the others: its coordinates in the mesh, and sums and decisions over all.

    `dp_rank` of `dp_size` says which rows of a step are this rank's.
    """

    def __init__(self, config: ParallelConfig, device: torch.device):
        self.config, self.device = config, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.replicas, self.shards, self.tp = config.degrees(self.world_size)
        self.dp_size = self.replicas * self.shards
        self.dp_rank, self.tp_rank = divmod(self.rank, self.tp)
        self.replica, self.shard_rank = divmod(self.dp_rank, self.shards)
        self.copy_size = self.shards * self.tp  # ranks that hold one copy of the weights together
        self.copy_rank = self.rank % self.copy_size
        names = ("dp_replicate", "dp_shard", "tp")
        self.mesh = init_device_mesh(device.type, (self.replicas, self.shards, self.tp), mesh_dim_names=names)
        self.tp_group, self.replica_group = self.mesh.get_group("tp"), self.mesh.get_group("dp_replicate")
        copies = [list(range(first, first + self.copy_size)) for first in range(0, self.world_size, self.copy_size)]
        self.copy_group = [dist.new_group(copy) for copy in copies][self.replica]
        self.host_group = dist.new_group(backend="gloo")  # for objects in memory, also from another thread

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes the run directory."""
        return self.rank == 0

    def share_rows(self, num_rows: int) -> tuple[int, int]:
        """Return (first, count) of this rank's rows among the `num_rows` rows of a step.

        The rows of a step are the same for any number of ranks. Raises UserError when they cannot be dealt evenly.
        """
        if num_rows % self.dp_size:
            raise UserError(
                f"sequences_per_step={num_rows} is not a multiple of the {self.dp_size} data-parallel processes "
                f"(parallel.dp_replicate={self.replicas} x parallel.dp_shard={self.shards}). "
                f"Use {num_rows // self.dp_size * self.dp_size or self.dp_size}, or other degrees."
            )
        count = num_rows // self.dp_size
        return self.dp_rank * count, count

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums of `values` over the data-parallel ranks (tensor-parallel ones hold the same), in float64, alike on all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return (total / self.tp).tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank, alike on all ranks."""
        raised = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def tell(self, value: Any) -> Any:
        """Return the leader's `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu") if self.device.type == "cpu" else self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in the order of the ranks, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def wait(self) -> None:
        """Return when every rank has come here."""
        dist.barrier(group=self.host_group)


def world_size() -> int:
    """Return how many processes were launched together; torchrun and Ray Train say it by WORLD_SIZE."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_leader() -> bool:
    """Return whether this process is the one of those launched together that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def open_ranks(config: ParallelConfig) -> Iterator[Ranks | None]:
    """Join the processes that torchrun (or Ray Train) launched; give None for a lone process.

    One accelerator a process where there are any, NCCL over them; gloo on CPUs. A process group that exists already is used and left
    open. Raises UserError when the degrees' product is not WORLD_SIZE.
    """
    config.degrees(world_size())
    if world_size() == 1:
        yield None
        return
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=datetime.timedelta(seconds=config.timeout_s))
    try:
        with _one_voice(), warnings.catch_warnings():
            # Said of each block under tensor parallelism; none of our blocks changes its result in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield Ranks(config, device)
    finally:
        if joined:
            dist.destroy_process_group()


class Silenced(UserError):
    """Another rank has already said what went wrong; the text is empty."""

    def __init__(self, error: BaseException):
        super().__init__("")
        self.exit_code = getattr(error, "exit_code", 1)


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Let the first rank that fails be the one that speaks; the others leave with `Silenced`.

    A rank that loses a peer sees only a broken connection; where no rank had an error of its own, the first to notice says so.
    """
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()

    def first() -> bool:
        try:
            return store.add("plinth/failed", 1) == 1
        except Exception:  # the store lives in the launcher or in rank 0; where it is gone, each speaks for itself
            return True

    try:
        yield
    except Exception as error:
        lost = _lost_contact(error)
        if lost:
            _wait_for_failure(store)
        if not first():
            raise Silenced(error) from None
        if lost:
            raise UserError(
                f"rank {rank} lost contact with another process: {str(error).splitlines()[0]} Pass --resume to go on."
            ) from None
        if rank and isinstance(error, UserError):
            error.args = (f"rank {rank}: {error}",)
        raise


def _lost_contact(error: BaseException) -> bool:
    text = str(error)
    signs = ("Connection closed", "Connection reset", "Timed out waiting", "timed out", "Broken pipe", "NCCL", "gloo")
    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or any(sign in text for sign in signs)


def _wait_for_failure(store: dist.Store) -> None:
    """Give the rank whose error broke the connection half a second to be the one that speaks."""
    with contextlib.suppress(Exception):
        store.wait(["plinth/failed"], datetime.timedelta(seconds=0.5))


def balanced(costs: dict[str, float], parts: int) -> list[list[str]]:
    """Deal names to `parts` owners so that their sums of costs are about equal; the same on every rank.

    Longest processing time first: at most 4/3 of the best. Source: Graham 1969.
    """
    owners: list[list[str]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = min(range(parts), key=lambda i: (loads[i], i))
        owners[least].append(name)
        loads[least] += costs[name]
    return owners


def padded(tensors: list[torch.Tensor], size: int, like: torch.Tensor) -> torch.Tensor:
    """Return the tensors end to end as one vector of `size`, zeros behind; dtype and device of `like`."""
    out = like.new_zeros(size)
    if tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        out[: flat.numel()] = flat
    return out
