"""Which requests run, and what each reads in a step.

First come, first served. A request starts when a place is free and the pool can promise all the blocks that it may ever
need, so nothing that runs is ever thrown out again. One whose prompt begins with what another is just reading waits for
it, and then shares it; those that come behind it do not get its place.
"""

from __future__ import annotations

import heapq
from collections import deque
from itertools import chain

import numpy as np

from plinth.inference.blocks import BlockPool, num_blocks
from plinth.inference.request import Request
from plinth.inference.runner import BLOCK_TOKENS

BUSY_PREFILL_TOKENS = 256  # prompt tokens a step while others decode, so that they wait little
IDLE_PREFILL_TOKENS = 512


class Scheduler:
    """Holds all requests between `add` and their end; `spare` blocks of the pool stay out of their reach."""

    def __init__(self, pool: BlockPool, max_batch: int, max_seq_len: int, spare: int):
        self.pool, self.spare = pool, spare
        self.tables = np.zeros((max_batch, num_blocks(max_seq_len)), np.int32)
        self.waiting: deque[Request] = deque()
        self.reading: dict[int, Request] = {}
        self.decoding: dict[int, Request] = {}
        self._followers: list[Request] = []  # those that wait for a prefix
        self._slots = list(range(max_batch))  # a heap

    def admit(self) -> None:
        """Start the waiting requests that can, in order."""
        self._followers = []
        while self.waiting and len(self._followers) < len(self._slots):
            request = self.waiting.popleft()
            if self._is_being_read(request):
                self._followers.append(request)
            elif not self._start(request):
                self.waiting.appendleft(request)
                break
        self.waiting.extendleft(reversed(self._followers))

    def _start(self, request: Request) -> bool:
        table = self.tables[self._slots[0]]
        share = not request.wants_prompt_logprobs  # which need every row of the prompt
        request.sequence = self.pool.open(table, request.prompt, request.capacity_tokens, share=share, spare=self.spare)
        if request.sequence is None:
            return False
        request.num_cached = len(request.sequence.tokens)
        self.pool.grow(request.sequence, len(request.prompt))
        request.slot = heapq.heappop(self._slots)
        self.reading[request.id] = request
        return True

    def _is_being_read(self, request: Request) -> bool:
        """Return whether another request is reading more of this one's prompt than is known so far."""
        if not self.pool.prefix_caching or request.wants_prompt_logprobs:
            return False
        readers = [reader for reader in self.reading.values() if reader.first_block == request.first_block]
        if not readers:
            return False
        if any(np.array_equal(reader.prompt, request.prompt) for reader in readers):
            return True
        most = max(_common(reader.prompt, request.prompt) for reader in readers)
        known = len(self.pool.find(request.prompt)[0]) * BLOCK_TOKENS
        return min(most, len(request.prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS > known

    def start_twins(self, request: Request) -> tuple[list[Request], list[tuple[int, int]]]:
        """Start the requests that waited for the very prompt that `request` has read to its end.

        Returns them, and the blocks to be copied for them as pairs (source, target).
        """
        twins, pairs = [], []
        for follower in self._followers:
            if not self._slots or follower.first_block != request.first_block or not np.array_equal(follower.prompt, request.prompt):
                continue
            table = self.tables[self._slots[0]]
            follower.sequence = self.pool.fork(request.sequence, table, follower.capacity_tokens, spare=self.spare)
            if follower.sequence is None:
                break
            pair = self.pool.make_writable(follower.sequence)
            pairs += [pair] if pair else []
            follower.slot = heapq.heappop(self._slots)
            self.decoding[follower.id] = follower
            twins.append(follower)
        for twin in twins:
            self._followers.remove(twin)
            self.waiting.remove(twin)
        return twins, pairs

    def prompt_parts(self, max_scored_tokens: int) -> list[tuple[Request, int, int]]:
        """Return (request, first position, position after the last) of what is read in this step.

        Parts end on whole blocks or with the prompt. Of prompts whose log-probabilities are wanted at most
        max_scored_tokens are read.
        """
        room = BUSY_PREFILL_TOKENS if self.decoding else IDLE_PREFILL_TOKENS
        parts = []
        for request in self.reading.values():
            start, end = len(request.sequence.tokens), len(request.prompt)
            stop = min(end, start + min(room, max_scored_tokens if request.wants_prompt_logprobs else room))
            if stop < end:
                stop -= stop % BLOCK_TOKENS
            if stop <= start:
                continue
            parts.append((request, start, stop))
            room -= stop - start
            if request.wants_prompt_logprobs:
                max_scored_tokens -= stop - start
            if room < BLOCK_TOKENS:
                break
        return parts

    def finish_reading(self, request: Request) -> None:
        """Move a request on to decoding."""
        self.decoding[request.id] = self.reading.pop(request.id)

    def remove(self, request_id: int) -> Request | None:
        """Drop a request, wherever it is, and free its place and blocks at once; None for one that has ended."""
        request = self.decoding.pop(request_id, None) or self.reading.pop(request_id, None)
        if request is not None:
            self.pool.release(request.sequence)
            heapq.heappush(self._slots, request.slot)
            return request
        for request in self.waiting:
            if request.id == request_id:
                self.waiting.remove(request)
                if request in self._followers:
                    self._followers.remove(request)
                return request
        return None

    def check_integrity(self) -> None:
        """Assert that places and blocks are conserved."""
        running = list(chain(self.reading.values(), self.decoding.values()))
        assert sorted([*self._slots, *(request.slot for request in running)]) == list(range(len(self.tables)))
        self.pool.check_integrity(request.sequence for request in running)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two prompts begin with alike."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
