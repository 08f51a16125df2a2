"""Keys and values of past positions, one slot a sequence, and what a batch of rows reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plinth.models.config import DecoderConfig
from plinth.ops.rope import rope_table

SMALLEST_WINDOW = 64


@dataclass(frozen=True)
class Span:
    """Rows start..stop of a batch that attend alike: `rows_per_slot` consecutive rows to each slot's first `window` positions."""

    start: int
    stop: int
    rows_per_slot: int
    window: int


@dataclass(frozen=True)
class View:
    """A span made ready once for all layers."""

    rows: slice
    slots: slice | torch.Tensor
    rows_per_slot: int
    window: int
    mask_A1RW: torch.Tensor
    """0 where row r of group a may look, -inf elsewhere"""


class KVCache:
    """Static tensors `keys` and `values` of shape (num_layers, num_slots, K, S, E); S is max_seq_len."""

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.num_slots = num_slots
        self.max_seq_len = max_seq_len or config.max_seq_len
        shape = (config.num_layers, num_slots, config.num_kv_heads, self.max_seq_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        cos, sin = rope_table(torch.arange(self.max_seq_len), config.head_dim, config.rope_theta, config.attention_multiplier**0.5)
        self.cos_SE, self.sin_SE = cos.to(device, dtype), sin.to(device, dtype)
        self._positions_S = torch.arange(self.max_seq_len, device=device)

    @property
    def bytes(self) -> int:
        """Memory that keys and values take when every position is used."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def window(self, position: int) -> int:
        """Return how many positions a row at `position` reads: a power of two, a function of its position alone."""
        return min(max(SMALLEST_WINDOW, 1 << position.bit_length()), self.max_seq_len)

    def write(self, layer: int, slots_N: torch.Tensor, positions_N: torch.Tensor, k_NKE, v_NKE) -> None:
        """Store the keys and values of N rows at their (slot, position)."""
        self.keys[layer][slots_N, :, positions_N] = k_NKE
        self.values[layer][slots_N, :, positions_N] = v_NKE

    def views(self, slots_N: torch.Tensor, positions_N: torch.Tensor, spans: Sequence[Span] | None) -> list[View]:
        """Make the spans ready; None = every row alone and the whole cache."""
        if spans is None:
            spans = [Span(0, len(slots_N), 1, self.max_seq_len)]
        return [self._view(slots_N, positions_N, span) for span in spans]

    def _view(self, slots_N: torch.Tensor, positions_N: torch.Tensor, span: Span) -> View:
        slots_A = slots_N[span.start : span.stop : span.rows_per_slot]
        positions_AR = positions_N[span.start : span.stop].unflatten(0, (-1, span.rows_per_slot))
        future_ARW = self._positions_S[: span.window] > positions_AR[..., None]
        mask_ARW = torch.zeros(future_ARW.shape, dtype=self.keys.dtype, device=self.keys.device)
        mask_ARW.masked_fill_(future_ARW, -torch.inf)
        return View(slice(span.start, span.stop), _as_slice(slots_A), span.rows_per_slot, span.window, mask_ARW[:, None])

    def read(self, layer: int, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a view's slots, (A, K, W, E); nothing is copied when the slots lie side by side."""
        keys, values = self.keys[layer][:, :, : view.window], self.values[layer][:, :, : view.window]
        if isinstance(view.slots, slice):
            return keys[view.slots], values[view.slots]
        return keys.index_select(0, view.slots), values.index_select(0, view.slots)


def _as_slice(slots_A: torch.Tensor) -> slice | torch.Tensor:
    slots = slots_A.tolist()
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return slots_A
