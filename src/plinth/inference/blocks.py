"""Which blocks of keys and values belong to which sequence, and which of them later sequences find again.

A full block is known by the block before it and by its own tokens, so that a chain of lookups finds the longest prefix
that any earlier sequence has read; the tokens themselves are compared, so a hit is never wrong. Blocks that nobody uses
stay findable until they are needed for something else, the longest unused first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from plinth.inference.runner import BLOCK_TOKENS

ROOT = 0  # the prefix before the first block


class OutOfBlocks(RuntimeError):
    """The pool has no block left for something that did not reserve what it needs."""


@dataclass(eq=False, slots=True)
class CachedSequence:
    """A sequence whose keys and values lie in blocks."""

    table: np.ndarray
    """int32 (max_blocks,): its row of a block table, kept up to date"""
    tokens: list[int] = field(default_factory=list)
    """tokens whose keys and values are written"""
    blocks: list[int] = field(default_factory=list)
    """blocks in order, those that are not written yet too"""
    reserved: int = 0
    """blocks that it may still take for sure"""
    num_published: int = 0
    """its first blocks, which others may find"""
    prefix: int = ROOT
    """number of the prefix that ends with the last published block"""


class BlockPool:
    """Hands out blocks 0 to num_blocks - 1. With prefix_caching off nothing is ever found again."""

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True):
        self.num_blocks, self.prefix_caching = num_blocks, prefix_caching
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low blocks first, so that little memory is ever touched
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable and unused, the longest unused first
        self._reserved = 0
        self._found: dict[tuple[int, bytes], tuple[int, int]] = {}  # (prefix, tokens) -> (block, number of the longer prefix)
        self._keys: dict[int, tuple[int, bytes]] = {}
        self._next_prefix = ROOT + 1

    @property
    def num_available(self) -> int:
        """Blocks that are neither used nor reserved."""
        return len(self._free) + len(self._idle) - self._reserved

    @property
    def num_findable(self) -> int:
        """Full blocks that a new sequence could share."""
        return len(self._found)

    def find(self, prompt: np.ndarray) -> tuple[list[int], int]:
        """Return the blocks that hold the longest known prefix of an int32 prompt, and the prefix's number.

        The last token is never part of it: it has to run, so that something follows from it.
        """
        blocks: list[int] = []
        prefix = ROOT
        for start in range(0, (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
            hit = self._found.get((prefix, prompt[start : start + BLOCK_TOKENS].tobytes()))
            if hit is None:
                break
            blocks.append(hit[0])
            prefix = hit[1]
        return blocks, prefix

    def open(
        self, table: np.ndarray, prompt: np.ndarray, capacity_tokens: int, *, share: bool = True, spare: int = 0
    ) -> CachedSequence | None:
        """Return a sequence that may grow to capacity_tokens, with the known prefix of its prompt read already.

        None when that would leave less than `spare` blocks for others.
        """
        shared, prefix = self.find(prompt) if share and self.prefix_caching else ([], ROOT)
        needed = num_blocks(capacity_tokens) - len(shared)
        if needed + sum(self._users[block] == 0 for block in shared) + spare > self.num_available:
            return None
        sequence = CachedSequence(table, num_published=len(shared), prefix=prefix)
        self._share(sequence, shared, prompt[: len(shared) * BLOCK_TOKENS].tolist(), needed)
        return sequence

    def fork(
        self, sequence: CachedSequence, table: np.ndarray, capacity_tokens: int | None = None, *, spare: int = 0
    ) -> CachedSequence | None:
        """Return a second sequence with all that is written of the first; call `make_writable` before it grows.

        With capacity_tokens it reserves what it needs to grow so far; None when that would leave less than `spare` blocks.
        """
        written = len(sequence.tokens)
        needed = 0 if capacity_tokens is None else num_blocks(capacity_tokens) - written // BLOCK_TOKENS
        if needed and needed + spare > self.num_available:
            return None
        other = CachedSequence(table, num_published=sequence.num_published, prefix=sequence.prefix)
        self._share(other, sequence.blocks[: num_blocks(written)], list(sequence.tokens), needed)
        return other

    def _share(self, sequence: CachedSequence, blocks: Sequence[int], tokens: list[int], reserved: int) -> None:
        for block in blocks:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1
        sequence.tokens, sequence.blocks, sequence.reserved = tokens, list(blocks), reserved
        sequence.table[: len(blocks)] = blocks
        self._reserved += reserved

    def make_writable(self, sequence: CachedSequence) -> tuple[int, int] | None:
        """Give the sequence a last block of its own if it is part full and shared; return (source, target) to be copied."""
        if len(sequence.tokens) % BLOCK_TOKENS == 0:
            return None
        last = len(sequence.tokens) // BLOCK_TOKENS
        source = sequence.blocks[last]
        if self._users[source] == 1:
            return None
        target = self._take(sequence)
        self._users[source] -= 1
        sequence.blocks[last] = sequence.table[last] = target
        return source, target

    def blocks_needed(self, sequences: Iterable[CachedSequence]) -> int:
        """Return how many blocks these take from the pool before each has its next token; reserved ones count too."""
        part_full: Counter[int] = Counter()
        fresh = 0
        for sequence in sequences:
            last, offset = divmod(len(sequence.tokens), BLOCK_TOKENS)
            if offset:
                part_full[sequence.blocks[last]] += 1
            else:
                fresh += last == len(sequence.blocks)
        return fresh + sum(count - (self._users[block] == count) for block, count in part_full.items())

    def grow(self, sequence: CachedSequence, num_tokens: int) -> None:
        """Make sure that the sequence has blocks for num_tokens in all. Raises OutOfBlocks where it did not reserve them."""
        while len(sequence.blocks) * BLOCK_TOKENS < num_tokens:
            block = self._take(sequence)
            sequence.table[len(sequence.blocks)] = block
            sequence.blocks.append(block)

    def _take(self, sequence: CachedSequence) -> int:
        if sequence.reserved:
            sequence.reserved -= 1
            self._reserved -= 1
        elif self.num_available < 1:
            raise OutOfBlocks(f"all {self.num_blocks} blocks of keys and values are in use or reserved.")
        block = self._free.pop() if self._free else self._forget(next(iter(self._idle)))
        self._users[block] = 1
        return block

    def _forget(self, block: int) -> int:
        del self._idle[block]
        del self._found[self._keys.pop(block)]
        return block

    def publish(self, sequence: CachedSequence, num_tokens: int) -> None:
        """Let others find the full blocks among the first num_tokens written tokens."""
        if not self.prefix_caching:
            return
        full = min(len(sequence.tokens), num_tokens) // BLOCK_TOKENS
        for index in range(sequence.num_published, full):
            tokens = np.array(sequence.tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS], np.int32)
            key, block = (sequence.prefix, tokens.tobytes()), sequence.blocks[index]
            if key not in self._found:  # else someone else was first, and this block stays private
                self._found[key] = (block, self._next_prefix)
                self._keys[block] = key
                self._next_prefix += 1
            sequence.prefix = self._found[key][1]
            sequence.num_published = index + 1

    def release(self, sequence: CachedSequence) -> None:
        """Take back the blocks of a sequence that has ended; the last ones are the first to be used for something else."""
        self._reserved -= sequence.reserved
        for block in reversed(sequence.blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        sequence.blocks, sequence.tokens, sequence.reserved = [], [], 0

    def forget_all(self) -> None:
        """Make every block unfindable: what they hold is no longer what the model would write."""
        self._free += self._idle
        self._idle.clear()
        self._found.clear()
        self._keys.clear()

    def check_integrity(self, sequences: Iterable[CachedSequence]) -> None:
        """Assert that every block is used by exactly the given sequences, or free, or findable, and that none is lost."""
        sequences = list(sequences)
        users = Counter(block for sequence in sequences for block in sequence.blocks)
        assert self._users == [users[block] for block in range(self.num_blocks)], "a block's users are miscounted"
        unused = sorted([*self._free, *self._idle])
        assert unused == [block for block in range(self.num_blocks) if not users[block]], "a block is lost, or free and used"
        assert self._reserved == sum(sequence.reserved for sequence in sequences) and self.num_available >= 0
        assert set(self._idle) <= set(self._keys) and not set(self._free) & set(self._keys)
        assert {key: self._found[key][0] for key in self._found} == {key: block for block, key in self._keys.items()}
        for sequence in sequences:
            assert sequence.table[: len(sequence.blocks)].tolist() == sequence.blocks
            assert len(sequence.tokens) <= len(sequence.blocks) * BLOCK_TOKENS


def num_blocks(num_tokens: int) -> int:
    """Return how many blocks hold num_tokens positions."""
    return -(-num_tokens // BLOCK_TOKENS)
