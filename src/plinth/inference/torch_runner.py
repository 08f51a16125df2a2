"""Runs a decoder in plain PyTorch, in any dtype on any device, over a paged cache.

A row's arithmetic is a function of its own position and of whether it reads a prompt, never of its company: generated
tokens attend one row at a time, prompts in chunks of PREFILL_CHUNK rows aligned to their start (what is missing of a
chunk is filled up), and each reads a window of the cache whose length follows from its position. See plinth.ops.linear
for the matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from plinth.inference.runner import BLOCK_TOKENS, Rows, check_same_shape
from plinth.models.kv_cache import SMALLEST_WINDOW, PagedCache, View
from plinth.models.transformer import Transformer
from plinth.ops.linear import pad_rows

PREFILL_CHUNK = 16
FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FILLER = 0  # token of rows that only fill a chunk or a tile; nothing reads what they give


class TorchRunner:
    """A runner over the model's own weights: what changes them changes the next call."""

    uniform = False

    def __init__(self, model: Transformer):
        self.config = model.config
        self.vocab_size = model.config.vocab_size
        self.max_seq_len = model.config.max_seq_len
        self.device = model.embed.weight.device
        self._dtype = model.embed.weight.dtype
        self.weights = FORMATS.get(self._dtype, str(self._dtype))
        self.model = model
        self.allocate(1)

    def reload(self, model: Transformer) -> None:
        """Run another model of the same configuration, dtype and device from now on; what the cache holds is stale then."""
        check_same_shape(model, self.config)
        self.model = model.to(self.device, self._dtype)

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, with one block more that rows write to which only fill."""
        self.cache = PagedCache(self.model.config, num_blocks + 1, BLOCK_TOKENS, self.max_seq_len, self._dtype, self.device)
        self._scratch = num_blocks

    def block_bytes(self) -> int:
        """Return the bytes of keys and values that one block takes."""
        config = self.model.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BLOCK_TOKENS * self._dtype.itemsize

    @torch.inference_mode()
    def forward(self, rows: Rows) -> torch.Tensor:
        """Return the logits of the wanted rows, float32 (M, V)."""
        hidden_MD = self._run(rows)
        if not len(hidden_MD):
            return torch.empty(0, self.vocab_size, device=self.device)
        missing = pad_rows(len(hidden_MD)) - len(hidden_MD)
        tiles = torch.cat([hidden_MD, hidden_MD[:1].expand(missing, -1)]) if missing else hidden_MD
        return self.model.logits_rows(tiles).float()[: len(hidden_MD)]

    @torch.inference_mode()
    def hidden(self, rows: Rows) -> torch.Tensor:
        """Return the hidden states after the last norm of the wanted rows, float32 (M, D)."""
        return self._run(rows).float()

    @torch.inference_mode()
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each pair (source, target)."""
        if pairs:
            self.cache.copy(pairs)

    def _run(self, rows: Rows) -> torch.Tensor:
        layout = _Layout(rows, self.cache.max_seq_len, self._scratch)
        tokens_N, positions_N, places_N = (self._tensor(column) for column in (layout.tokens, layout.positions, layout.places))
        views = [self._view(layout, positions_N, *span) for span in layout.spans]
        hidden_ND = self.model.forward_rows(tokens_N, positions_N, places_N, self.cache, views)
        return hidden_ND[self._tensor(layout.row_of[rows.wanted])]

    def _view(self, layout: _Layout, positions_N: torch.Tensor, start: int, stop: int, rows_per_group: int, window: int) -> View:
        blocks_AC = layout.blocks_of(layout.sequences[start:stop:rows_per_group], window)
        return self.cache.view(slice(start, stop), self._tensor(blocks_AC), positions_N[start:stop].unflatten(0, (-1, rows_per_group)))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


class _Layout:
    """The rows of a call in the order that the model runs them: decoded rows, prompt chunks, each by window, then filling."""

    def __init__(self, rows: Rows, max_seq_len: int, scratch: int):
        self._tables, self._max_seq_len, self._scratch = rows.block_tables, max_seq_len, scratch
        self.row_of = np.empty(len(rows.tokens), np.int64)
        """at [i] the place of the caller's row i in the order here"""
        self.spans: list[tuple[int, int, int, int]] = []
        """(first row, row after the last, rows that attend together, window)"""
        decoded, read = np.flatnonzero(~rows.prefill), np.flatnonzero(rows.prefill)
        windows = self._windows(rows.positions[decoded])
        order = np.argsort(windows, kind="stable")
        self.row_of[decoded[order]] = np.arange(len(decoded))
        self._add_spans(0, windows[order], 1)
        count = self._add_chunks(rows, read, len(decoded)) if len(read) else len(decoded)
        self._fill(rows, pad_rows(count))

    def _add_chunks(self, rows: Rows, read: np.ndarray, first_row: int) -> int:
        sequences, chunks = rows.sequences[read], rows.positions[read] // PREFILL_CHUNK
        begins = np.flatnonzero(np.r_[True, (np.diff(sequences) != 0) | (np.diff(chunks) != 0)])
        numbers = np.repeat(np.arange(len(begins)), np.diff(np.r_[begins, len(read)]))
        windows = self._windows(chunks[begins] * PREFILL_CHUNK + PREFILL_CHUNK - 1)
        order = np.argsort(windows, kind="stable")
        first_rows = np.empty(len(begins), np.int64)
        first_rows[order] = first_row + PREFILL_CHUNK * np.arange(len(begins))
        self.row_of[read] = first_rows[numbers] + rows.positions[read] % PREFILL_CHUNK
        self._add_spans(first_row, windows[order], PREFILL_CHUNK)
        self._chunks = first_rows, sequences[begins], chunks[begins]
        return first_row + PREFILL_CHUNK * len(begins)

    def _fill(self, rows: Rows, count: int) -> None:
        """Place the rows; those that fill write to the scratch block, and only see positions of their own chunk's window."""
        self.tokens = np.full(count, FILLER)
        self.positions = np.zeros(count, np.int64)
        self.sequences = np.zeros(count, np.int64)
        self.places = np.full(count, self._scratch * BLOCK_TOKENS)
        if hasattr(self, "_chunks"):
            for offset in range(PREFILL_CHUNK):
                first_rows, sequences, chunks = self._chunks
                self.positions[first_rows + offset] = chunks * PREFILL_CHUNK + offset
                self.sequences[first_rows + offset] = sequences
        self.tokens[self.row_of] = rows.tokens
        self.positions[self.row_of] = rows.positions
        self.sequences[self.row_of] = rows.sequences
        blocks = rows.block_tables[rows.sequences, rows.positions // BLOCK_TOKENS].astype(np.int64)
        self.places[self.row_of] = blocks * BLOCK_TOKENS + rows.positions % BLOCK_TOKENS

    def _windows(self, positions: np.ndarray) -> np.ndarray:
        """Return how many positions the row at each position reads: a power of two, a function of the position alone."""
        powers = np.left_shift(1, np.ceil(np.log2(positions + 1.0)).astype(np.int64))
        return np.clip(powers, min(SMALLEST_WINDOW, self._max_seq_len), self._max_seq_len)

    def _add_spans(self, first_row: int, windows: np.ndarray, rows_per_group: int) -> None:
        for window, start, stop in _runs(windows):
            self.spans.append((first_row + start * rows_per_group, first_row + stop * rows_per_group, rows_per_group, window))

    def blocks_of(self, sequences: np.ndarray, window: int) -> np.ndarray:
        """Return the blocks of the first `window` positions of some sequences, (A, window / BLOCK_TOKENS).

        Where a table ends earlier, nothing is visible any more, and the scratch block stands in.
        """
        count = window // BLOCK_TOKENS
        blocks = self._tables[sequences, :count]
        return np.pad(blocks, ((0, 0), (0, count - blocks.shape[1])), constant_values=self._scratch)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (value, first index, index after the last) of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1 if len(values) else []
    bounds = [0, *edges, len(values)] if len(values) else []
    for start, stop in zip(bounds, bounds[1:]):
        yield int(values[start]), int(start), int(stop)
