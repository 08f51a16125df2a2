"""Keys and values of past positions, in blocks that any sequence may use, and what a batch of rows reads of them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plinth.models.config import DecoderConfig
from plinth.models.rope import has_own_rotation, rotation

SMALLEST_WINDOW = 64


@dataclass(frozen=True)
class View:
    """Rows of a batch that attend alike: A groups of consecutive rows, each group to the first positions of a sequence."""

    rows: slice
    rows_per_group: int
    blocks: torch.Tensor
    """int64 (A * window / block_tokens,): the blocks that hold each group's positions, in order"""
    mask_A1RW: torch.Tensor
    """0 where row r of group a may look, -inf elsewhere"""
    window_mask_A1RW: torch.Tensor | None = None
    """the same for blocks with a sliding window; None where it shows all that comes before"""

    def mask(self, slides: bool) -> torch.Tensor:
        """Return the mask of a block with a sliding window, or of one without."""
        return self.window_mask_A1RW if slides and self.window_mask_A1RW is not None else self.mask_A1RW


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return zeros that on a CPU take memory only where they are used: the system gives zeroed pages, torch would write them all."""
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or not count or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the tensor keeps it alive
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


class PagedCache:
    """Static tensors `keys` and `values` of shape (num_layers, K, num_blocks, block_tokens, E).

    `max_seq_len` is rounded up to whole blocks.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_tokens: int,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.block_tokens = block_tokens
        self.max_seq_len = -(-(max_seq_len or config.max_seq_len) // block_tokens) * block_tokens
        shape = (config.num_layers, config.num_kv_heads, num_blocks, block_tokens, config.head_dim)
        self.keys, self.values = (untouched_zeros(shape, dtype, device) for _ in range(2))
        self.sliding_window = config.sliding_window
        self._rotations = {}
        for local in (False, True)[: 1 + has_own_rotation(config)] if config.position == "rope" else ():
            table = rotation(config, torch.arange(self.max_seq_len), local=local)
            self._rotations[local] = tuple(x.to(device, dtype) for x in table)

    @property
    def bytes(self) -> int:
        """Memory that keys and values take when every position is used."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def rotation(self, positions_N: torch.Tensor, *, local: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return cos and sin of positions, (N, E) each, `local` those of blocks with a window; None where nothing is rotated."""
        if not self._rotations:
            return None, None
        cos_SE, sin_SE = self._rotations[local and True in self._rotations]
        return cos_SE[positions_N], sin_SE[positions_N]

    def view(self, rows: slice, blocks_AC: torch.Tensor, positions_AR: torch.Tensor) -> View:
        """Make a view ready once for all layers; C blocks are the window of each group."""
        window = blocks_AC.shape[1] * self.block_tokens
        places_W, positions_AR1 = torch.arange(window, device=positions_AR.device), positions_AR[..., None]
        hidden_ARW = places_W > positions_AR1
        masks = [self._mask(hidden_ARW)]
        if self.sliding_window is not None and self.sliding_window < window:
            masks.append(self._mask(hidden_ARW | (places_W <= positions_AR1 - self.sliding_window)))
        return View(rows, positions_AR.shape[1], blocks_AC.flatten(), *masks)

    def _mask(self, hidden_ARW: torch.Tensor) -> torch.Tensor:
        """Return what is added to scores, (A, 1, R, W)."""
        mask_ARW = torch.zeros(hidden_ARW.shape, dtype=self.keys.dtype, device=self.keys.device)
        return mask_ARW.masked_fill_(hidden_ARW, -torch.inf)[:, None]

    def write(self, layer: int, places_N: torch.Tensor, k_NKE: torch.Tensor, v_NKE: torch.Tensor) -> None:
        """Store the keys and values of N rows; a place is block * block_tokens + offset."""
        self.keys[layer].flatten(1, 2)[:, places_N] = k_NKE.transpose(0, 1)
        self.values[layer].flatten(1, 2)[:, places_N] = v_NKE.transpose(0, 1)

    def read(self, layer: int, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a view's keys and values, (A, K, W, E)."""
        groups = view.mask_A1RW.shape[0]
        keys, values = (
            x[layer].index_select(1, view.blocks).flatten(1, 2).unflatten(1, (groups, -1)).transpose(0, 1) for x in (self.keys, self.values)
        )
        return keys, values

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, each pair (source, target)."""
        source, target = (torch.tensor(column, device=self.keys.device) for column in zip(*pairs))
        for x in (self.keys, self.values):
            x[:, :, target] = x[:, :, source]
