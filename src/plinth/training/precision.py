"""Master weights in fp32 behind a model that computes in fp32 or bf16."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from plinth.training.device import choose_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fastest_dtype(device: str | None = None) -> str:
    """Return bfloat16 where the device (default: the one that training takes) multiplies it faster, else float32; takes 0.1 s."""
    if torch.device(choose_device(device)).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    seconds = {}
    for name, dtype in DTYPES.items():
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return min(seconds, key=lambda name: seconds[name])


@torch.no_grad()
def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, rounding to the target's dtype."""
    torch._foreach_copy_(targets, sources)


class MasterWeights:
    """The fp32 weights that the optimizer moves; `publish` rounds them into the model's own dtype. Both lie on `device`.

    `ranks` is None: these are one process's whole weights. `training.sharded_weights` has those of many.
    """

    ranks = None

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: str = "cpu"):
        self.device = torch.device(device)
        model.to(self.device, torch.float32)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        frozen = [p for p in model.parameters() if not p.requires_grad and p.dtype != dtype]
        self._frozen = [(p, p.detach().clone()) for p in frozen]  # what does not move is rounded for the computation only
        self.model = model.to(dtype)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices that are trained by name, each with the row counts of the projections fused in it."""
        return {name: rows for name, rows in self.model.matrix_parts().items() if name in self.tensors}

    def plain_name(self, name: str) -> str:
        """Return the model's own name of a tensor."""
        return name

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank: here there is one."""
        return flag

    def finish(self) -> None:
        """Let the model end in fp32 on the CPU."""
        self.model.float()
        self.publish()
        for parameter, whole in self._frozen:
            parameter.data.copy_(whole)
        self.model.to("cpu")

    def norm(self, grads: list[torch.Tensor], workers: Any) -> torch.Tensor:
        """Return the norm of the whole gradient, a scalar on the device.

        On a CPU each tensor's is taken by one core: its last bits must not depend on how many cores share a sum.
        """
        norms = torch._foreach_norm(grads) if self.device.type != "cpu" else workers.map(torch.linalg.vector_norm, grads)
        return torch.linalg.vector_norm(torch.stack(list(norms)))

    @torch.no_grad()
    def publish(self, workers: Any = None) -> None:
        """Copy the fp32 weights into the model; `workers` share the copying."""
        sources = [self.tensors[name] for name in self.names]
        if workers is None:
            copy_all(self.parameters, sources)
            return
        shares = min(workers.num_threads, len(sources))
        workers.map(lambda i: copy_all(self.parameters[i::shares], sources[i::shares]), range(shares))

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over saved weights by name."""
        for name in self.names:
            self.tensors[name].copy_(tensors[name])
        self.publish()
