"""The gate of the feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plinth.ops import kernels


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.kernel = kernels.usable(gate_up)
        if ctx.kernel:
            gate_up = gate_up.contiguous()
            y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
            kernels.call("swiglu_forward", gate_up, y, y.numel() // y.shape[-1], y.shape[-1])
            ctx.save_for_backward(gate_up)
            return y
        gate, up = gate_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx, grad):
        if ctx.kernel:
            (gate_up,) = ctx.saved_tensors
            grad_gate_up = torch.empty_like(gate_up)
            kernels.call("swiglu_backward", gate_up, grad.contiguous(), grad_gate_up, grad.numel() // grad.shape[-1], grad.shape[-1])
            return grad_gate_up
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up, where the last dimension holds gate, then up.  The slow twin is that formula.

    On a GPU, where the compiler fuses it, the formula is what runs.
    """
    if gate_up.device.type != "cpu":
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)
