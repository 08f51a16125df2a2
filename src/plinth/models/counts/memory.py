"""What training and serving hold in memory, from a ledger: states by optimizer and sharding, adapters, activations, weights and cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from plinth.models.counts.ledger import Ledger

SHARDINGS = ("none", "zero1", "zero2", "zero3")
WEIGHT_BYTES: Mapping[str, Fraction] = {  # numbers alone; formats with scales of groups hold up to an eighth more
    "fp32": Fraction(4), "bf16": Fraction(2), "8-bit": Fraction(1), "4-bit": Fraction(1, 2),
}  # fmt: skip
NF4_BITS = Fraction(4) + Fraction(8, 64) + Fraction(32, 64 * 256)  # 4 bits, an 8-bit scale each 64 numbers, an fp32 one each 256 scales
ADAPTER_STATE = 16  # bytes a parameter of an adapter that AdamW trains in mixed precision
KEPT_PER_WIDTH, KEPT_LOGIT = 34, 10


@dataclass(frozen=True)
class StateBytes:
    """Bytes a parameter that training holds besides activations."""

    weights: int
    """weights that the forward pass reads"""
    gradients: int
    """gradients"""
    optimizer: int
    """the optimizer's state, with the fp32 weights that it updates where the forward pass reads others"""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


# Mixed precision holds bf16 weights and gradients, and fp32 weights beside the moments; Muon, Lion and SGD have one moment, Adafactor
# keeps rows and columns of its second one, which are next to nothing.
OPTIMIZERS: Mapping[str, StateBytes] = {
    "AdamW, bf16": StateBytes(2, 2, 12),
    "AdamW, fp32 gradients": StateBytes(2, 4, 12),
    "AdamW, all fp32": StateBytes(4, 4, 8),
    "AdamW, all bf16": StateBytes(2, 2, 4),
    "AdamW, 8-bit moments": StateBytes(2, 2, 6),
    "Muon, Lion, SGD": StateBytes(2, 2, 8),
    "Adafactor": StateBytes(2, 2, 4),
}


def state_bytes(params: int, state: StateBytes, gpus: int, sharding: str) -> int:
    """Return the bytes of weights, gradients and optimizer state on each of `gpus` accelerators, rounded up.

    ZeRO-1 shards the optimizer's state, ZeRO-2 the gradients too, ZeRO-3 (FSDP) the weights too; what ZeRO-3 gathers of a layer while it
    computes is left out. Source: Rajbhandari et al. 2020, arXiv:1910.02054, figure 1.
    """
    part = math.ceil(params / gpus)
    weights = part if sharding == "zero3" else params
    gradients = part if sharding in ("zero2", "zero3") else params
    optimizer = params if sharding == "none" else part
    return weights * state.weights + gradients * state.gradients + optimizer * state.optimizer


def adapter_params(ledger: Ledger, rank: int) -> int:
    """Return the parameters of low-rank adapters on all matrices but the head: rank numbers a row and a column of each.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    return sum(
        piece.copies * rank * (piece.shape[0] + math.prod(piece.shape[1:]))
        for piece in ledger.pieces
        if piece.kind == "matrix" and not piece.name.startswith("head")
    )


def adapter_bytes(ledger: Ledger, rank: int, *, quantised: bool = False) -> int:
    """Return the bytes of finetuning by adapters: frozen weights in bf16, or matrices in 4-bit NormalFloat, and the adapters' state.

    Source: Dettmers et al. 2023, arXiv:2305.14314 (blocks of 64, scales quantised in blocks of 256).
    """
    adapters = ADAPTER_STATE * adapter_params(ledger, rank)
    matrices = sum(piece.params for piece in ledger.pieces if piece.kind == "matrix" and not piece.name.startswith("head"))
    if not quantised:
        return 2 * ledger.total + adapters
    return 2 * (ledger.total - matrices) + math.ceil(matrices * NF4_BITS / 8) + adapters


def activation_bytes(ledger: Ledger, context: int, *, recompute: bool = False) -> int:
    """Return about how many bytes a forward pass of one example keeps in bf16 for its backward pass.

    34 a position and channel of each block, where attention keeps no probabilities; 2 where each block is computed again. Logits: 2 in
    bf16, 4 in fp32 and 4 of their gradient. An estimate: gated layers, grouped heads and fused operations keep more or less.
    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.
    """
    lengths = ledger.lengths(context)
    per_width = 2 if recompute else KEPT_PER_WIDTH
    blocks = sum(per_width * group.layers * lengths[group.stream] * group.hidden_size for group in ledger.attending)
    scored = lengths.get("target", lengths.get("text", 0))
    return blocks + KEPT_LOGIT * ledger.vocab_size * scored


def serve_bytes(ledger: Ledger, context: int, sequences: int, weight_bytes: Fraction = Fraction(2), cache_bytes: int = 2) -> int:
    """Return the bytes of all weights and of the cache of so many sequences of `context` tokens."""
    return math.ceil(ledger.total * weight_bytes) + sequences * ledger.kv_numbers(context) * cache_bytes
