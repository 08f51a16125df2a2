"""How long does a layer of experts take, forward and backward: grouped, looped over the experts, and as transformers has it?

One layer with its router, the same weights and tokens for all sides, which alternate; medians of processor time over rounds, in one
thread. Every round has other tokens, so that experts get other numbers of rows each time, as in training. Two shapes with about equally
many active parameters: few wide experts as in Mixtral, many narrow ones as in Qwen3-MoE. `dense` is an ordinary layer as wide as a
token's experts together: the same products without the routing. Writes benchmarks/records/moe_grouped.json; takes three minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from plinth.ops.linear import linear
from plinth.ops.moe import gated_experts, looped_experts, route
from plinth.ops.swiglu import swiglu
from record import spread, write_record

WARMUP = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THEIRS = ("eager", "grouped_mm")  # batched_mm copies the matrices for every assignment: tens of gigabytes here


@dataclass(frozen=True)
class Shape:
    """A layer of experts and the tokens that it gets."""

    hidden_size: int
    num_experts: int
    num_active: int
    expert_size: int
    tokens: int


SHAPES = {"8 experts, 2 active": Shape(512, 8, 2, 768, 2048), "64 experts, 8 active": Shape(512, 64, 8, 192, 2048)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measurements a figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that processor time is time on a machine with nothing else to do
    rows = [row for name in SHAPES for dtype in DTYPES for row in measure(name, dtype, arguments.rounds)]
    print(write_record("moe_grouped", __doc__.splitlines()[0], rows, threads=1))
    return 0


def measure(name: str, dtype: str, rounds: int) -> list[dict]:
    """Return one row a side: processor time of a forward and backward pass, and how far its output is from the definition's."""
    shape, generator = SHAPES[name], torch.Generator().manual_seed(0)
    weights = draw(shape, generator)
    size = rounds + WARMUP, shape.tokens, shape.hidden_size
    tokens = torch.randn(size, generator=generator).to(DTYPES[dtype])
    grad = torch.randn(size[1:], generator=generator).to(DTYPES[dtype])
    sides = {side: build(shape, DTYPES[dtype], weights) for side, build in SIDES.items()}
    exact = sides["looped"][0](tokens[0]).detach().float()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + WARMUP):
        x = tokens[turn].clone().requires_grad_()
        for side, (function, parameters) in sides.items():
            start = time.process_time()
            torch.autograd.grad(function(x), [x, *parameters], grad)
            if turn >= WARMUP:
                seconds[side].append(1e3 * (time.process_time() - start))
    rows = []
    for side, values in seconds.items():
        error = None if side == "dense" else ((sides[side][0](tokens[0]).detach().float() - exact).norm() / exact.norm()).item()
        rows.append({"shape": name, "dtype": dtype, "side": side, "cpu_milliseconds": spread(values), "relative_difference": error})
        print(f"{name:22} {dtype:9} {side:26} {rows[-1]['cpu_milliseconds']['median']:8.1f} ms")
    return rows


def draw(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return fp32 weights: the router's, the experts' as both sides stack them."""
    D, X, F_ = shape.hidden_size, shape.num_experts, shape.expert_size
    return {
        "router": torch.randn(X, D, generator=generator) * D**-0.5,
        "gate_up": torch.randn(X, 2 * F_, D, generator=generator) * D**-0.5,
        "down": torch.randn(X, D, F_, generator=generator) * F_**-0.5,
    }


Side = tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.Tensor]]


def build_ours(experts: Callable, shape: Shape, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> Side:
    """Return our layer on one of the two ways to compute it."""
    router, gate_up, down = (weights[name].to(dtype).flatten(0, -2).requires_grad_() for name in ("router", "gate_up", "down"))

    def layer(x_ND: torch.Tensor) -> torch.Tensor:
        return experts(x_ND, route(F.linear(x_ND, router), shape.num_active), gate_up, down)

    return layer, [router, gate_up, down]


def build_theirs(implementation: str, shape: Shape, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> Side:
    """Return Mixtral's block of transformers on one of its ways to compute it."""
    config = MixtralConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.expert_size, num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.num_active,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    state = {"gate.weight": weights["router"], "experts.gate_up_proj": weights["gate_up"], "experts.down_proj": weights["down"]}
    block.load_state_dict(state)
    block.to(dtype)
    return lambda x_ND: block(x_ND[None])[0], list(block.parameters())


def build_dense(shape: Shape, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> Side:
    """Return an ordinary layer of the width of a token's experts."""
    gate_up = torch.cat([weights["gate_up"][: shape.num_active, half::2].flatten(0, 1) for half in (0, 1)]).to(dtype).requires_grad_()
    down = weights["down"][: shape.num_active].transpose(0, 1).flatten(1).to(dtype).contiguous().requires_grad_()
    return lambda x_ND: linear(swiglu(linear(x_ND, gate_up)), down), [gate_up, down]


SIDES: dict[str, Callable[[Shape, torch.dtype, dict[str, torch.Tensor]], Side]] = {
    "grouped": partial(build_ours, gated_experts),
    "looped": partial(build_ours, looped_experts),
    **{f"transformers {name}": partial(build_theirs, name) for name in THEIRS},
    "dense": build_dense,
}

if __name__ == "__main__":
    raise SystemExit(main())
