"""Reading whole sequences for what the model says of each place: log-probabilities and hidden states.

Works on the runner and the pool that requests use, between their steps, in blocks that nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from plinth.inference.blocks import BlockPool, CachedSequence, OutOfBlocks, num_blocks
from plinth.inference.request import TopLogprobs
from plinth.inference.runner import BLOCK_TOKENS, Rows, Runner
from plinth.inference.sampling import largest_logprobs, peaks

LOGITS_BYTES = 32 * 2**20  # logits of one call while scoring
MOST_ROWS = 256


def scored_rows(vocab_size: int) -> int:
    """Return how many rows of logits a call may give while scoring, whole blocks of positions."""
    rows = LOGITS_BYTES // (4 * vocab_size)
    return max(BLOCK_TOKENS, min(MOST_ROWS, rows // BLOCK_TOKENS * BLOCK_TOKENS))


def logprobs_of(logits_NV: torch.Tensor, targets_M: np.ndarray, count: int) -> list[tuple[float, TopLogprobs]]:
    """Return for each target token its log-probability in nats and the `count` most probable tokens; further rows are left."""
    logits_MV = logits_NV[: len(targets_M)]
    log_sums_M = peaks(logits_MV)[1]
    targets = torch.from_numpy(targets_M.astype(np.int64)).to(logits_MV.device)
    values = logits_MV.gather(-1, targets[:, None])[:, 0] - log_sums_M
    return list(zip(values.tolist(), largest_logprobs(logits_MV, log_sums_M, count)))


class Scorer:
    """Scores and embeds sequences of int32 tokens, as many at once as there are free blocks for."""

    def __init__(self, runner: Runner, pool: BlockPool, max_seq_len: int):
        self._runner, self._pool, self._max_blocks = runner, pool, num_blocks(max_seq_len)

    def score(self, sequences: Sequence[np.ndarray], count: int) -> list[list[tuple[float, TopLogprobs]]]:
        """Return for each sequence, at each place but the first, what `logprobs_of` says."""
        scores: list[list[tuple[float, TopLogprobs]]] = [[] for _ in sequences]
        limit = scored_rows(self._runner.vocab_size)
        for rows, parts in self._calls([tokens[:-1] for tokens in sequences], limit):
            logits_MV, at = self._runner.forward(rows), 0
            for i, start, stop in parts:
                scores[i] += logprobs_of(logits_MV[at : at + stop - start], sequences[i][start + 1 : stop + 1], count)
                at += stop - start
        return scores

    def embed(self, prompts: Sequence[np.ndarray], pooling: str) -> torch.Tensor:
        """Return one vector a prompt, float32 (P, D)."""
        states: list[list[torch.Tensor]] = [[] for _ in prompts]
        vectors: list[torch.Tensor | None] = [None] * len(prompts)
        for rows, parts in self._calls(prompts, MOST_ROWS):
            hidden_MD = self._runner.hidden(rows)
            for (i, _, stop), part_RD in zip(parts, hidden_MD.split([stop - start for _, start, stop in parts])):
                states[i].append(part_RD)
                if stop == len(prompts[i]):
                    whole = torch.cat(states[i])
                    vectors[i] = whole[-1].clone() if pooling == "last" else whole.double().mean(0).float()
                    states[i].clear()
        return torch.stack(vectors)

    def _calls(self, sequences: Sequence[np.ndarray], limit: int) -> Iterator[tuple[Rows, list[tuple[int, int, int]]]]:
        """Yield the rows of each call with its parts (sequence, first position, position after the last); all rows are wanted."""
        pending = [i for i in range(len(sequences)) if len(sequences[i])]
        while pending:
            group, opened = self._open(sequences, pending)
            try:
                pieces = [(i, start) for i in group for start in range(0, len(sequences[i]), BLOCK_TOKENS)]
                per_call = limit // BLOCK_TOKENS
                for begin in range(0, len(pieces), per_call):
                    parts = [(i, start, min(start + BLOCK_TOKENS, len(sequences[i]))) for i, start in pieces[begin : begin + per_call]]
                    yield self._rows(sequences, group, opened, parts), parts
            finally:
                for sequence in opened:
                    self._pool.release(sequence)
            pending = pending[len(group) :]

    def _open(self, sequences: Sequence[np.ndarray], pending: list[int]) -> tuple[list[int], list[CachedSequence]]:
        group: list[int] = []
        opened: list[CachedSequence] = []
        for i in pending:
            sequence = self._pool.open(np.zeros(self._max_blocks, np.int32), sequences[i], len(sequences[i]), share=False)
            if sequence is None:
                break
            self._pool.grow(sequence, len(sequences[i]))
            group.append(i)
            opened.append(sequence)
            if len(opened) * BLOCK_TOKENS >= MOST_ROWS:  # enough to fill calls
                break
        if not opened:  # requests never take the blocks that scoring needs
            raise OutOfBlocks(f"an open search holds all but {self._pool.num_available} blocks. Close it first.")
        return group, opened

    def _rows(
        self, sequences: Sequence[np.ndarray], group: list[int], opened: list[CachedSequence], parts: list[tuple[int, int, int]]
    ) -> Rows:
        place = {i: k for k, i in enumerate(group)}
        tokens = np.concatenate([sequences[i][start:stop] for i, start, stop in parts])
        positions = np.concatenate([np.arange(start, stop, dtype=np.int32) for _, start, stop in parts])
        rows = np.concatenate([np.full(stop - start, place[i], np.int32) for i, start, stop in parts])
        tables = np.stack([sequence.table for sequence in opened])
        return Rows(tokens, positions, rows, tables, np.arange(len(tokens), dtype=np.int32), np.ones(len(tokens), bool))
