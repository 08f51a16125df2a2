"""Keys and values of past positions, one slot a sequence."""

from __future__ import annotations

import torch

from plinth.models.config import DecoderConfig


class KVCache:
    """Static tensors `keys` and `values` of shape (num_layers, num_slots, max_seq_len, K, E)."""

    def __init__(
        self, config: DecoderConfig, num_slots: int, max_seq_len: int | None = None, dtype: torch.dtype = torch.float32
    ):
        self.num_slots = num_slots
        self.max_seq_len = max_seq_len or config.max_seq_len
        shape = (config.num_layers, num_slots, self.max_seq_len, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)

    def write(self, layer: int, slots_N: torch.Tensor, positions_N: torch.Tensor, k_NKE, v_NKE) -> None:
        """Store the keys and values of N rows at their (slot, position)."""
        self.keys[layer].index_put_((slots_N, positions_N), k_NKE)
        self.values[layer].index_put_((slots_N, positions_N), v_NKE)
