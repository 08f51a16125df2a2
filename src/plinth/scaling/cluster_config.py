"""What a user asks of a plan for a cluster, and the layout that a plan answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plinth.config import UserError

Checkpointing = Literal["none", "selective", "alternate", "block"]


@dataclass(frozen=True)
class ClusterConfig:
    """A model, a cluster, and what the plan keeps to. None: the plan decides."""

    gpus: int
    """accelerators; within a node, or a multiple of gpus_per_node"""
    model: str
    """a published model (llama-3-70b, olmo-2-32b, ...), or the path of a config.json in Hugging Face's format"""
    gpu: str = "h100-sxm"
    """accelerator: a100-sxm, a100-sxm-40gb, h100-sxm, h100-sxm-500w, h100-pcie, h200-sxm, b200-sxm, mi300x, l40s"""
    gpus_per_node: int = 8
    """accelerators that share a node's fast links"""
    tokens: float | None = None
    """training tokens; unset: the compute-optimal number for the model"""
    seq_len: int | None = None
    """training context, tokens; unset: what the model was pretrained with, else 8192 or its longest if that is less"""
    tokens_per_step: int | None = None
    """tokens an update, a multiple of seq_len; unset: by Step Law, rounded so that the accelerators divide it"""
    dtype: Literal["bf16", "fp8"] = "bf16"
    """type of the block's matrix products; attention, head and all that is stored stay bf16"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """optimizer of the blocks' matrices"""
    parallelism: Literal["plinth", "any"] = "plinth"
    """plinth: only what Plinth runs (FSDP, hybrid sharding, tensor parallelism, checkpointing); any: pipeline and context too"""
    shard: int | None = None
    """ranks that share parameters, gradients and optimizer state (FSDP)"""
    tensor: int | None = None
    """ranks that share each matrix, within a node"""
    pipeline: int | None = None
    """stages of layers; more than 1 needs --parallelism any"""
    context: int | None = None
    """ranks that share each sequence; more than 1 needs --parallelism any"""
    micro_batch_size: int | None = None
    """sequences a forward pass"""
    checkpointing: Checkpointing | None = None
    """what the backward pass computes again: none; selective, all but products; alternate, every second product too; block, whole blocks"""
    chunked_loss: bool = True
    """a loss that never holds all logits, as Plinth's; false: all logits of a micro-batch, in bf16 and fp32, with their gradient"""
    memory_margin: float = 0.1
    """share of the memory kept free: fragmentation, and what the formulas miss"""
    network_gbps: float | None = None
    """network of one accelerator, gigabits/s a direction; unset: the accelerator's usual one"""
    watts_per_gpu: float | None = None
    """power of a busy accelerator, watts; unset: its limit"""
    pue: float = 1.1
    """power of the data centre over power of the accelerators and their hosts"""
    host_share: float = 0.15
    """power of host, memory and network over that of the accelerators"""
    price_per_gpu_hour: float = 0.0
    """price of one accelerator for an hour, in a currency of yours; 0: no price"""
    co2_g_per_kwh: float = 0.0
    """grams of CO2 equivalent a kWh where the cluster stands; 0: not given"""
    alternatives: int = 5
    """runners-up to show"""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "tokens", "seq_len", "tokens_per_step", "shard", "tensor", "pipeline", "context",
                     "micro_batch_size", "network_gbps", "watts_per_gpu", "pue", "alternatives"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value:g} must be positive.")
        for name in ("price_per_gpu_hour", "co2_g_per_kwh", "host_share"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name):g} must not be negative.")
        if not 0 <= self.memory_margin < 1:
            raise UserError(f"memory_margin={self.memory_margin:g} is a share of the memory: at least 0, below 1.")
        self._check_nodes()
        self._check_degrees()

    def _check_nodes(self) -> None:
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            down = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise UserError(
                f"gpus={self.gpus} does not fill nodes of gpus_per_node={self.gpus_per_node}. "
                f"Use {down} or {down + self.gpus_per_node}, or change gpus_per_node."
            )
        if self.seq_len and self.tokens_per_step and self.tokens_per_step % self.seq_len:
            raise UserError(f"tokens_per_step={self.tokens_per_step} is not a multiple of seq_len={self.seq_len}.")

    def _check_degrees(self) -> None:
        for name in ("shard", "tensor", "pipeline", "context"):
            degree = getattr(self, name)
            if degree is not None and self.gpus % degree:
                raise UserError(f"{name}={degree} does not divide gpus={self.gpus}.")
        if self.tensor is not None and self.gpus_per_node % self.tensor:
            raise UserError(
                f"tensor={self.tensor} does not divide gpus_per_node={self.gpus_per_node}; its ranks exchange data in every layer "
                "and must share a node. Use a divisor."
            )
        beyond = [name for name in ("pipeline", "context") if (getattr(self, name) or 1) > 1]
        if beyond and self.parallelism == "plinth":
            name = beyond[0]
            raise UserError(f"{name}={getattr(self, name)} is beyond what Plinth runs. Pass --parallelism any to plan it, or drop it.")


@dataclass(frozen=True)
class Layout:
    """How the work of a step is laid over the accelerators; ranks next to each other share the tensor group, then context, shard,
    replicate and pipeline groups."""

    replicate: int = 1
    """groups that each hold a whole copy of the sharded state (HSDP)"""
    shard: int = 1
    """ranks that share parameters, gradients and optimizer state (FSDP)"""
    tensor: int = 1
    """ranks that share each matrix"""
    pipeline: int = 1
    """stages of layers"""
    context: int = 1
    """ranks that share each sequence (ring attention)"""
    micro_batch_size: int = 1
    """sequences a forward pass"""
    checkpointing: Checkpointing = "none"
    """activations that are recomputed"""
    reshard: bool = True
    """free gathered parameters after each use (ZeRO-3); else they stay for the whole step (ZeRO-2)"""
    reduce_each: bool = True
    """reduce gradients to shards after every micro-batch; else they add up whole and are reduced once a step"""
    virtual_stages: int = 1
    """chunks of layers a rank holds in an interleaved pipeline"""
    sequence_parallel: bool = True
    """tensor-parallel ranks divide norms and residuals by position too; else each has them whole"""
    overlap_tensor: bool = False
    """tensor-parallel transfers run behind the products (asynchronous tensor parallelism)"""

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def state_ranks(self) -> int:
        """Ranks that share parameters, gradients and optimizer state: those of the shard group, and of the context group with them."""
        return self.shard * self.context

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def runs_in_plinth(self) -> bool:
        """Say whether Plinth itself has all that the layout needs."""
        return (
            self.pipeline == 1
            and self.context == 1
            and self.checkpointing != "alternate"
            and self.reshard == (self.shard > 1)
            and not self.reduce_each
            and (self.tensor == 1 or not self.sequence_parallel)
            and not self.overlap_tensor
        )

    def __str__(self) -> str:
        sharded = f"HSDP {self.replicate} x {self.shard}" if self.replicate > 1 else f"FSDP {self.shard}"
        parts = [sharded] if self.shard > 1 else [f"DP {self.replicate}"]
        parts += [f"{label} {size}" for label, size in (("TP", self.tensor), ("PP", self.pipeline), ("CP", self.context)) if size > 1]
        parts.append(f"micro-batch {self.micro_batch_size}")
        parts += [f"{self.checkpointing} checkpointing"] * (self.checkpointing != "none")
        parts += ["parameters kept"] * (self.state_ranks > 1 and not self.reshard)
        parts += ["gradients reduced each time"] * self.reduce_each
        return ", ".join(parts)

    def group_on_node(self, dimension: str, gpus_per_node: int) -> tuple[int, int]:
        """Return (size of a group, how many of its ranks share a node): tensor, context, state, replicate, or next stage (two ranks)."""
        size, stride = {
            "tensor": (self.tensor, 1),
            "context": (self.context, self.tensor),
            "state": (self.state_ranks, self.tensor),
            "replicate": (self.replicate, self.tensor * self.state_ranks),
            "next stage": (2, self.tensor * self.state_ranks * self.replicate),
        }[dimension]
        return size, max(1, min(size, gpus_per_node // stride))
