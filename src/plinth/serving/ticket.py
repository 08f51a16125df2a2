"""The sequences of one request, and their text on its way from the engine's thread to the client."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from plinth.inference.constraint import Constraint
from plinth.inference.sampling import SamplingParams
from plinth.serving.errors import ApiError
from plinth.serving.limits import Limits
from plinth.serving.metrics import Metrics
from plinth.serving.pieces import Assembly, Piece
from plinth.serving.records import RequestRecord
from plinth.tokenizer.encode import Tokenizer


@dataclass(frozen=True)
class Work:
    """One sequence to generate."""

    prompt: list[int]
    """token ids"""
    params: SamplingParams | None
    """None for nothing to generate: the echo is the whole answer"""
    constraint: Constraint | None = None
    """what restricts its tokens; it belongs to this sequence alone"""
    echo: Piece | None = None
    """the prompt as the answer's first piece"""


@dataclass(eq=False)
class Sequence:
    """One sequence between its ticket and the engine."""

    index: int
    """its place in the request"""
    work: Work
    """what to generate"""
    ticket: Ticket
    """whom its text is for"""
    assembly: Assembly
    """its text as it grows"""
    cancelled: bool = False
    """whether nobody wants it any more"""
    engine_id: int = -1
    """the engine's number of it"""
    admitted_s: float = 0.0
    """when the engine took it"""
    last_token_s: float | None = None
    """when its last token came, None before the first"""
    num_generated: int = 0
    """tokens so far"""
    ended: bool = False
    """whether its last piece, or an error, has come"""


class Ticket:
    """The sequences of one request, to iterate over in the event loop that asked for them.

    What comes while the client does not read is kept up to `limits.max_buffered_pieces`; then the request is given up.
    """

    def __init__(
        self,
        works: list[Work],
        tokenizer: Tokenizer,
        limits: Limits,
        metrics: Metrics,
        record: RequestRecord,
        cancel: Callable[[list[Sequence]], None],
    ):
        self.loop = asyncio.get_running_loop()
        self._works, self._limits, self._metrics, self._record, self._cancel = works, limits, metrics, record, cancel
        self._items: deque[tuple[int, Piece | Exception]] = deque()
        self._arrived = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.sequences = [
            Sequence(index, work, self, Assembly(tokenizer, work.params.stop))
            for index, work in enumerate(works)
            if work.params is not None
        ]

    @property
    def size(self) -> int:
        """The number of sequences, those with nothing to generate too."""
        return len(self._works)

    @property
    def record(self) -> RequestRecord:
        """The record of the request."""
        return self._record

    def begin(self) -> None:
        """Start the clock of a request that has been queued."""
        for sequence in self.sequences:
            self._metrics.prompt_tokens += len(sequence.work.prompt)
            self._metrics.prompt_lengths.observe(len(sequence.work.prompt))
        if self.sequences:
            self._timer = self.loop.call_later(self._limits.request_timeout_s, self._expire)

    def receive(self, sequence: Sequence, item: Piece | Exception) -> None:
        """Take what the engine's thread has sent; runs in the event loop."""
        if sequence.ended:
            return
        if isinstance(item, Piece):
            self._count(sequence, item)
        else:
            sequence.ended = True
            self._metrics.finished["abort"] += 1
        self._items.append((sequence.index, item))
        if len(self._items) > self._limits.max_buffered_pieces:
            self.cancel()
            self._fail(ApiError(503, "The client reads too slowly; its answer was given up.", code="slow_client"))
        self._arrived.set()

    def _count(self, sequence: Sequence, piece: Piece) -> None:
        now = time.perf_counter()
        if piece.num_generated:
            self._record.completion_tokens += piece.num_generated
            self._metrics.generation_tokens += piece.num_generated
            sequence.num_generated += piece.num_generated
            if sequence.last_token_s is None:
                self._metrics.ttft_s.observe(now - self._record.started_s)
                self._metrics.queue_s.observe(max(0.0, sequence.admitted_s - self._record.started_s))
                if self._record.ttft_s is None:
                    self._record.ttft_s = now - self._record.started_s
            else:
                self._metrics.itl_s.observe((now - sequence.last_token_s) / piece.num_generated, piece.num_generated)
            sequence.last_token_s = now
        if piece.finish_reason is not None:
            sequence.ended = True
            self._record.finish_reasons.append(piece.finish_reason)
            self._metrics.finished[piece.finish_reason] += 1
            self._metrics.duration_s.observe(now - self._record.started_s)
            self._metrics.generation_lengths.observe(sequence.num_generated)

    def _expire(self) -> None:
        limit = self._limits.request_timeout_s
        self.cancel()
        self._fail(ApiError(504, f"The answer was not done after {limit:g} s, this server's limit. Ask for fewer tokens.", code="timeout"))

    def _fail(self, error: ApiError) -> None:
        self._items.append((0, error))
        self._arrived.set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (sequence index, piece) as they come, until each sequence has ended. Raises what the engine raised."""
        for index, work in enumerate(self._works):
            if work.echo is not None:
                yield index, work.echo
        running = len(self.sequences)
        while running:
            while not self._items:
                self._arrived.clear()
                await self._arrived.wait()
            index, item = self._items.popleft()
            if isinstance(item, Exception):
                raise item
            running -= item.finish_reason is not None
            yield index, item

    def cancel(self) -> None:
        """Give up all sequences that have not ended; their places in the batch are free before the next step."""
        if self._timer is not None:
            self._timer.cancel()
        unfinished = [sequence for sequence in self.sequences if not sequence.ended]
        for sequence in unfinished:
            sequence.ended = True
            self._metrics.finished["abort"] += 1
            self._record.finish_reasons.append("abort")
        if unfinished:
            self._cancel(unfinished)
