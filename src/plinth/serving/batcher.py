"""The engine's one thread: it batches the sequences of all requests and hands their text back as it comes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from plinth.config import UserError
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextEngine
from plinth.serving.errors import ApiError, bad_request, internal_error
from plinth.serving.pieces import Assembly, Piece

T = TypeVar("T")
LOG = logging.getLogger("plinth.serving")
RETRY_AFTER_S = 2
CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Work:
    """One sequence to generate."""

    prompt: list[int]
    params: SamplingParams | None
    """None for nothing to generate: the echo is the whole answer"""
    echo: Piece | None = None
    """the prompt as the answer's first piece"""


@dataclass(eq=False)
class Sequence:
    """One sequence between its ticket and the engine."""

    work: Work
    emit: Callable[[Piece | Exception], None]
    assembly: Assembly
    cancelled: bool = False
    engine_id: int = -1


class Ticket:
    """The sequences of one request, to iterate over in the event loop that asked for them."""

    def __init__(self, batcher: Batcher, works: list[Work]):
        self._batcher = batcher
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._works = works
        self.sequences = [
            Sequence(work, self._sender(index), Assembly(batcher.tokenizer, work.params.stop))
            for index, work in enumerate(works)
            if work.params is not None
        ]

    @property
    def size(self) -> int:
        """The number of sequences."""
        return len(self._works)

    def _sender(self, index: int) -> Callable[[Piece | Exception], None]:
        def emit(item: Piece | Exception) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))

        return emit

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (sequence index, piece) as they come, until each sequence has ended. Raises what the engine raised."""
        for index, work in enumerate(self._works):
            if work.echo is not None:
                yield index, work.echo
        running = len(self.sequences)
        while running:
            index, item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            running -= item.finish_reason is not None
            yield index, item

    def cancel(self) -> None:
        """Give up all sequences that have not ended; their places in the batch are free before the next step."""
        self._batcher.cancel(self.sequences)


class Batcher:
    """Owns the engine: only its thread touches it. Sequences that find no place in the batch wait, up to `max_queue`."""

    def __init__(self, text_engine: TextEngine, max_queue: int):
        self.engine, self.tokenizer, self.max_queue = text_engine.engine, text_engine.tokenizer, max_queue
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._calls: deque[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="plinth-engine", daemon=True)
        self._thread.start()

    @property
    def max_batch(self) -> int:
        return self.engine.max_batch

    @property
    def num_active(self) -> int:
        """Sequences in the batch."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, works: list[Work]) -> Ticket:
        """Queue the sequences of one request. Raises ApiError: 429 when the queue is full, 400 when they never fit."""
        if len(works) > self.max_batch + self.max_queue:
            raise bad_request(
                f"The request asks for {len(works)} sequences (prompts × n); this server takes "
                f"{self.max_batch + self.max_queue} at once. Ask for fewer, or start it with a larger --max-queue.",
                param="n",
            )
        ticket = Ticket(self, works)
        with self._changed:
            if self._closed:
                raise ApiError(503, "The server is stopping.", code="stopping")
            free = max(0, self.max_batch - len(self._active))
            if len(self._waiting) + len(works) > self.max_queue + free:
                raise ApiError(
                    429,
                    f"The queue is full: {len(self._waiting)} sequences wait, {self.max_queue} may. Try again soon.",
                    code="queue_full",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._waiting.extend(ticket.sequences)
            self._changed.notify()
        return ticket

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the engine's thread, between two steps, and return what it returns."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if not future.cancelled():
                future.set_exception(error) if error is not None else future.set_result(value)

        with self._changed:
            if self._closed:
                raise ApiError(503, "The server is stopping.", code="stopping")
            self._calls.append((function, lambda value, error: loop.call_soon_threadsafe(settle, value, error)))
            self._changed.notify()
        return await future

    def cancel(self, sequences: list[Sequence]) -> None:
        """Mark sequences as unwanted; the thread frees their places."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread after the step it is in; sequences that have not ended get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    # Below: the engine's thread only.

    def _run(self) -> None:
        while self._await_work():
            try:
                self._drop_cancelled()
                self._run_calls()
                self._admit()
                if self._active:
                    self._step()
            except UserError as error:  # the model itself is at fault, such as scores that are not numbers
                LOG.error("%s", error)
                self._fail_active(ApiError(500, str(error), code="model_error"))
            except Exception:
                LOG.exception("the engine failed; its %d sequences are answered with an error", len(self._active))
                self._fail_active(internal_error())
        self._fail_active(ApiError(503, "The server is stopping.", code="stopping"))

    def _await_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._waiting or self._active or self._calls):
                self._changed.wait()
            return not self._closed

    def _drop_cancelled(self) -> None:
        with self._changed:
            if any(sequence.cancelled for sequence in self._waiting):
                self._waiting = deque(sequence for sequence in self._waiting if not sequence.cancelled)
            dropped = [sequence for sequence in self._active.values() if sequence.cancelled]
        for sequence in dropped:
            self._leave(sequence)

    def _run_calls(self) -> None:
        while self._calls:
            function, settle = self._calls.popleft()
            try:
                settle(function(), None)
            except Exception as error:
                settle(None, error)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.max_batch:
            with self._changed:
                sequence = self._waiting.popleft()
            try:
                sequence.engine_id = self.engine.add(sequence.work.prompt, sequence.work.params)
                self._active[sequence.engine_id] = sequence
            except UserError as error:
                sequence.emit(bad_request(str(error)))
            except Exception:
                LOG.exception("the engine did not take a sequence")
                sequence.emit(internal_error())

    def _step(self) -> None:
        for event in self.engine.step():
            sequence = self._active.get(event.id)
            if sequence is None:
                continue
            piece = sequence.assembly.push(event)
            if piece.finish_reason:
                self._leave(sequence, finished=event.finish_reason is not None)
            sequence.emit(piece)

    def _leave(self, sequence: Sequence, finished: bool = False) -> None:
        self._active.pop(sequence.engine_id, None)
        if not finished:
            self.engine.cancel(sequence.engine_id)

    def _fail_active(self, error: ApiError) -> None:
        with self._changed:
            pending = [*self._active.values(), *(self._waiting if self._closed else ())]
            if self._closed:
                self._waiting.clear()
        for sequence in pending:
            self._leave(sequence)
            sequence.emit(error)
