"""The engine's one thread: it batches the sequences of all requests and hands their text back as it comes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from plinth.config import UserError
from plinth.inference.text import TextEngine
from plinth.serving.errors import ApiError, bad_request, internal_error
from plinth.serving.limits import Limits
from plinth.serving.metrics import Metrics
from plinth.serving.pieces import Piece
from plinth.serving.records import RequestRecord
from plinth.serving.ticket import Sequence, Ticket, Work

T = TypeVar("T")
LOG = logging.getLogger("plinth.serving")
RETRY_AFTER_S = 2
CLOSE_TIMEOUT_S = 30.0


class Batcher:
    """Owns the engine: only its thread touches it. Sequences that find no place in the batch wait, up to `max_queue`."""

    def __init__(self, text_engine: TextEngine, limits: Limits, metrics: Metrics):
        self.engine, self.tokenizer, self.limits, self.metrics = text_engine.engine, text_engine.tokenizer, limits, metrics
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="plinth-engine", daemon=True)
        self._thread.start()

    @property
    def max_batch(self) -> int:
        """Sequences that the batch holds."""
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
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def check_size(self, count: int) -> None:
        """Raise ApiError (400) when `count` sequences can never be taken at once."""
        room = self.max_batch + self.limits.max_queue
        if count > room:
            raise bad_request(
                f"The request asks for {count} sequences (prompts × n); this server takes {room} at once. "
                "Ask for fewer, or start it with a larger --max-queue.",
                param="n",
            )

    def submit(self, works: list[Work], record: RequestRecord) -> Ticket:
        """Queue the sequences of one request. Raises ApiError: 429 when the queue is full, 400 when they never fit."""
        self.check_size(len(works))
        ticket = Ticket(works, self.tokenizer, self.limits, self.metrics, record, self.cancel)
        with self._changed:
            self._refuse_when_closed()
            free = max(0, self.max_batch - len(self._active))
            if len(self._waiting) + len(ticket.sequences) > self.limits.max_queue + free:
                raise queue_full(len(self._waiting), self.limits.max_queue)
            self._waiting.extend(ticket.sequences)
            self._changed.notify()
        ticket.begin()
        return ticket

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the engine's thread, between two steps, and return what it returns. Raises ApiError 429 as `submit`."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._refuse_when_closed()
            if len(self._calls) >= self.limits.max_queue:
                raise queue_full(len(self._calls), self.limits.max_queue)
            self._calls.append((function, future))
            self._changed.notify()
        return await future

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise ApiError(503, "The server is stopping.", code="stopping")

    def cancel(self, sequences: list[Sequence]) -> None:
        """Mark sequences as unwanted; the thread frees their places before its next step."""
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
                self._run_call()
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
        for _, future in self._calls:
            settle(future, None, ApiError(503, "The server is stopping.", code="stopping"))

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

    def _run_call(self) -> None:
        """Run one call, so that those who decode wait for one at most."""
        if not self._calls:
            return
        function, future = self._calls.popleft()
        if future.cancelled():
            return
        try:
            settle(future, function(), None)
        except Exception as error:
            settle(future, None, error)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.max_batch:
            with self._changed:
                sequence = self._waiting.popleft()
            try:
                work = sequence.work
                sequence.engine_id = self.engine.add(work.prompt, work.params, work.constraint)
                sequence.admitted_s = time.perf_counter()
                self._active[sequence.engine_id] = sequence
            except UserError as error:
                deliver([(sequence, bad_request(str(error)))])
            except Exception:
                LOG.exception("the engine did not take a sequence")
                deliver([(sequence, internal_error())])

    def _step(self) -> None:
        pieces: list[tuple[Sequence, Piece | Exception]] = []
        for event in self.engine.step():
            sequence = self._active.get(event.id)
            if sequence is None:
                continue
            piece = sequence.assembly.push(event)
            if piece.finish_reason:
                self.engine.end(event.id)
                self._leave(sequence, finished=True)
            pieces.append((sequence, piece))
        deliver(pieces)

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
        deliver([(sequence, error) for sequence in pending])


def queue_full(waiting: int, limit: int) -> ApiError:
    """Return the 429 of a queue that holds `waiting` of at most `limit`."""
    return ApiError(
        429,
        f"The queue is full: {waiting} wait, {limit} may. Try again soon.",
        code="queue_full",
        retry_after_s=RETRY_AFTER_S,
    )


def deliver(pieces: list[tuple[Sequence, Piece | Exception]]) -> None:
    """Hand pieces to the tickets of their sequences: one wake-up of an event loop for all of a step."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Sequence, Piece | Exception]]] = {}
    for sequence, piece in pieces:
        by_loop.setdefault(sequence.ticket.loop, []).append((sequence, piece))
    for loop, items in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_receive, items)


def _receive(items: list[tuple[Sequence, Piece | Exception]]) -> None:
    for sequence, piece in items:
        sequence.ticket.receive(sequence, piece)


def settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    """Give a future of another thread's loop its result or its error."""

    def give() -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(value)

    loop = future.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(give)
