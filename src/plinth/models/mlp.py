"""The feed-forward layer and the matrix that all layers are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from plinth.models.config import DecoderConfig
from plinth.ops.linear import linear, linear_rows
from plinth.ops.swiglu import swiglu


class Linear(nn.Linear):
    """A matrix, without bias unless asked for, multiplied by `plinth.ops.linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def forward_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        return linear_rows(x_ND, self.weight, self.bias)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return GELU's approximation.  Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2."""
    return F.gelu(x, approximate="tanh")


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return tanh-GELU(gate) · up, where the last dimension holds gate, then up.  Source: Shazeer 2020, arXiv:2002.05202, eq. 6."""
    gate, up = gate_up.chunk(2, -1)
    return gelu_tanh(gate) * up


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Return relu(x)².  Source: So et al. 2021, arXiv:2109.08668, section 3 (Primer)."""
    return x.relu().square()


# In rows, GELU is written with tanh and erf: PyTorch's own rounds by the place of a number in the tensor, those two do not.
def gelu_rows(x: torch.Tensor) -> torch.Tensor:
    """Return GELU, x · Φ(x), each number's bits independent of its place."""
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def gelu_tanh_rows(x: torch.Tensor) -> torch.Tensor:
    """Return what `gelu_tanh` does, each number's bits independent of its place."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def geglu_rows(gate_up: torch.Tensor) -> torch.Tensor:
    """Return what `geglu` does, each number's bits independent of its place."""
    gate, up = gate_up.chunk(2, -1)
    return gelu_tanh_rows(gate) * up


Function = Callable[[torch.Tensor], torch.Tensor]
BETWEEN: dict[str, tuple[Function, Function]] = {  # activation → what is between the matrices, for training and in rows
    "swiglu": (swiglu, swiglu),
    "geglu": (geglu, geglu_rows),
    "relu2": (squared_relu, squared_relu),
    "gelu": (F.gelu, gelu_rows),
    "gelu_tanh": (gelu_tanh, gelu_tanh_rows),
}


class GatedFeedForward(nn.Module):
    """down(f(gate(x)) · up(x)); gate and up projections are one matrix, gate first.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "swiglu", bias: bool = False):
        super().__init__()
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias)
        self.down = Linear(intermediate_size, hidden_size, bias)
        self.between, self.between_rows = BETWEEN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.gate_up(x)))

    def forward_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        return self.down.forward_rows(self.between_rows(self.gate_up.forward_rows(x_ND)))

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the matrices by name, each with the row counts of the projections fused in it."""
        return {"gate_up.weight": (self.intermediate_size,) * 2, "down.weight": (self.hidden_size,)}


class FeedForward(nn.Module):
    """down(f(up(x))), without a gate."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "gelu", bias: bool = False):
        super().__init__()
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.up = Linear(hidden_size, intermediate_size, bias)
        self.down = Linear(intermediate_size, hidden_size, bias)
        self.between, self.between_rows = BETWEEN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))

    def forward_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        return self.down.forward_rows(self.between_rows(self.up.forward_rows(x_ND)))

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the matrices by name, each with its row count."""
        return {"up.weight": (self.intermediate_size,), "down.weight": (self.hidden_size,)}


def feed_forward(config: DecoderConfig, layer: int = 0) -> GatedFeedForward | FeedForward:
    """Return the feed-forward layer of a block, counted from 0."""
    kind = GatedFeedForward if config.is_gated else FeedForward
    return kind(config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias)
