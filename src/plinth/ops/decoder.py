"""The structures of ops/native/decoder.h, and the call that runs them."""

from __future__ import annotations

import ctypes
import os

from plinth.ops import kernels
from plinth.ops.matrix import Matrix

HEAD_DIMS = (32, 64, 96, 128)  # widths of a head that the kernels know


class Layer(ctypes.Structure):
    """Weights, scales of the norms (None for ones) and cache of one layer."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")),
    ]


class Decoder(ctypes.Structure):
    """A model."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("norm_eps", "attention_factor", "output_multiplier", "logit_softcap")),
        ("embed", Matrix),
        ("head", Matrix),
        *((name, ctypes.c_void_p) for name in ("final_norm", "cosines", "sines")),
        ("layers", ctypes.POINTER(Layer)),
    ]


class Call(ctypes.Structure):
    """The rows of one call and where its results go."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("num_rows", "max_blocks", "num_wanted", "threads")),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "sequences", "block_tables", "wanted", "logits", "hidden", "memory")),
    ]


def workspace_bytes(decoder: Decoder, call: Call) -> int:
    """Return the memory that a call needs."""
    return kernels.library().decoder_bytes(ctypes.byref(decoder), ctypes.byref(call))


def forward(decoder: Decoder, call: Call) -> None:
    """Run a call. Raises OSError when threads cannot be made."""
    error = kernels.library().decoder_forward(ctypes.byref(decoder), ctypes.byref(call))
    if error:
        raise OSError(error, f"{call.threads} threads for generation: {os.strerror(error)}")
