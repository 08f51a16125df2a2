"""Sequences that grow token by token under the caller's control: what beam search and other searches stand on.

They lie in the same pool as the requests of the engine and share prompts with them; a fork costs nothing until one of the
two grows, and then one block. A search takes blocks as it grows, so it may find none where requests have reserved them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from plinth.config import UserError
from plinth.inference.blocks import BlockPool, CachedSequence, OutOfBlocks, num_blocks
from plinth.inference.runner import Rows, Runner
from plinth.inference.scheduler import IDLE_PREFILL_TOKENS


class SequenceSpace:
    """Holds sequences by handle; `close`, or leaving its `with` block, frees them all."""

    def __init__(self, runner: Runner, pool: BlockPool, max_seq_len: int, check: Callable[[Sequence[int], int, str], np.ndarray]):
        self._runner, self._pool, self._max_seq_len, self._check = runner, pool, max_seq_len, check
        self._sequences: dict[int, CachedSequence] = {}
        self._next_handle = 0

    def __enter__(self) -> SequenceSpace:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @torch.inference_mode()
    def start(self, prompt: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Read a prompt and return its handle and the logits behind it, float32 (V,).

        Raises UserError where the prompt is empty or wrong, OutOfBlocks where there is no room for it now.
        """
        tokens = self._check(prompt, self._max_seq_len, "prompt")
        if not len(tokens):
            raise UserError("prompt is empty: the model needs at least one token to go on from.")
        sequence = self._pool.open(self._new_table(), tokens, len(tokens))
        if sequence is None:
            raise OutOfBlocks(f"no room for a prompt of {len(tokens)} tokens: {self._pool.num_available} blocks are free.")
        self._pool.grow(sequence, len(tokens))
        while len(sequence.tokens) < len(tokens):
            begin = len(sequence.tokens)
            part = tokens[begin : begin + IDLE_PREFILL_TOKENS]
            logits_MV = self._run([sequence], part, np.arange(begin, begin + len(part), dtype=np.int32), prefill=True)
            sequence.tokens += part.tolist()
        self._pool.publish(sequence, len(tokens))
        return self._add(sequence), logits_MV[0].clone()

    @torch.inference_mode()
    def extend(self, handles: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each of M different sequences and return the logits behind it, float32 (M, V), valid until the next call.

        Raises OutOfBlocks, before anything changes, where there is no room for them now.
        """
        sequences = [self._sequences[handle] for handle in handles]
        assert len(set(handles)) == len(handles) == len(tokens), "each sequence takes one token in a call"
        added = self._check(tokens, max(len(tokens), 1), "extension")
        longest = max(len(sequence.tokens) for sequence in sequences)
        if longest >= self._max_seq_len:
            raise OutOfBlocks(f"a sequence has {longest} tokens already, as many as the context holds.")
        if len(sequences) > self._pool.num_available:
            self._check_room(sequences)
        pairs = [pair for sequence in sequences if (pair := self._pool.make_writable(sequence))]
        self._runner.copy_blocks(pairs)
        for sequence in sequences:
            self._pool.grow(sequence, len(sequence.tokens) + 1)
        positions = np.array([len(sequence.tokens) for sequence in sequences], np.int32)
        logits_MV = self._run(sequences, added, positions, prefill=False)
        for sequence, token in zip(sequences, tokens):
            sequence.tokens.append(int(token))
            if self._runner.uniform:
                self._pool.publish(sequence, len(sequence.tokens))
        return logits_MV

    def _check_room(self, sequences: list[CachedSequence]) -> None:
        needed = self._pool.blocks_needed(sequences)
        if needed > self._pool.num_available:
            raise OutOfBlocks(
                f"{needed} blocks are needed and {self._pool.num_available} are free. Free some, or give the engine a larger "
                "max_cache_bytes or max_batch."
            )

    def fork(self, handle: int) -> int:
        """Return a handle to a second sequence with the same tokens."""
        return self._add(self._pool.fork(self._sequences[handle], self._new_table()))

    def tokens(self, handle: int) -> list[int]:
        """Return the tokens of a sequence, its prompt's too."""
        return list(self._sequences[handle].tokens)

    def free(self, handle: int) -> None:
        """Drop a sequence."""
        self._pool.release(self._sequences.pop(handle))

    def close(self) -> None:
        """Drop all sequences."""
        for handle in list(self._sequences):
            self.free(handle)

    def _new_table(self) -> np.ndarray:
        return np.zeros(num_blocks(self._max_seq_len), np.int32)

    def _add(self, sequence: CachedSequence) -> int:
        self._next_handle += 1
        self._sequences[self._next_handle] = sequence
        return self._next_handle

    def _run(self, sequences: list[CachedSequence], tokens: np.ndarray, positions: np.ndarray, prefill: bool) -> torch.Tensor:
        """Run one row each of several sequences, or many rows of one and want the last row's logits."""
        tables = np.stack([sequence.table for sequence in sequences])
        count = len(tokens)
        owners = np.arange(count, dtype=np.int32) if len(sequences) == count else np.zeros(count, np.int32)
        wanted = np.array([count - 1], np.int32) if prefill else np.arange(count, dtype=np.int32)
        return self._runner.forward(Rows(tokens, positions, owners, tables, wanted, np.full(count, prefill)))
