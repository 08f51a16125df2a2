"""Beam search for the page: the search itself runs in a thread, its model calls in the engine's, and each step is sent as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from plinth.config import UserError
from plinth.inference.beam import Beam, BeamParams, beam_search
from plinth.inference.blocks import OutOfBlocks
from plinth.inference.search import SequenceSpace
from plinth.serving.batcher import RETRY_AFTER_S
from plinth.serving.disconnect import until_disconnect
from plinth.serving.errors import ApiError, bad_request
from plinth.serving.page_place import Place, cache_full, describe, place_tokens
from plinth.serving.protocol import fit_context
from plinth.serving.records import RequestRecord, record_of
from plinth.serving.server import Server
from plinth.serving.stream import EventStream

MAX_BEAMS, MAX_STEPS, MAX_SEARCHES = 8, 64, 4
RETRY_S = 0.05


class BeamRequest(Place):
    """The body of POST /page/beams."""

    num_beams: int = Field(default=4, ge=2, le=MAX_BEAMS)
    max_tokens: int = Field(default=16, ge=1, le=MAX_STEPS)
    length_penalty: float = Field(default=1.0, ge=-2, le=4, allow_inf_nan=False)


def add_page_beams(app: FastAPI, server: Server) -> None:
    """Add the route."""
    searches: set[Search] = set()

    @app.post("/page/beams", include_in_schema=False)
    async def beams(body: BeamRequest, request: Request) -> Response:
        """Stream the steps of a beam search, then the best texts."""
        return await until_disconnect(request, begin(server, body, searches, record_of(request)))


async def begin(server: Server, request: BeamRequest, searches: set[Search], record: RequestRecord) -> Response:
    """Answer one POST /page/beams."""
    server.check_model(request.model)
    prompt = await place_tokens(server, request.messages, request.prompt, request.tokens)
    room = fit_context(len(prompt), None, server.engine.max_seq_len)
    if len(searches) >= MAX_SEARCHES:
        raise ApiError(429, f"{MAX_SEARCHES} beam searches run already. Try again soon.", code="queue_full", retry_after_s=RETRY_AFTER_S)
    params = BeamParams(
        num_beams=request.num_beams,
        num_return=request.num_beams,
        max_tokens=min(request.max_tokens, room),
        length_penalty=request.length_penalty,
    )
    record.prompt_tokens, record.streamed = len(prompt), True
    search = Search(server, prompt, params, searches.discard)
    searches.add(search)
    return EventStream(search, search.events())


@dataclass(frozen=True)
class Node:
    """One beam at one step."""

    tokens: tuple[int, ...]
    """the completion up to here"""
    logprob: float
    """its log-probability in nats"""


class Search:
    """One beam search: a thread that searches, and the events of it in the event loop."""

    def __init__(self, server: Server, prompt: list[int], params: BeamParams, at_end: Callable[[Search], None]):
        self._server, self._prompt, self._params, self._at_end = server, prompt, params, at_end
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        self._space = SharedSpace(server, self._loop, self._send)
        self._thread = self._loop.run_in_executor(None, self._run)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield each step, then the best texts. Raises what the search raised."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        """Stop before the next step."""
        self._space.cancelled = True

    def _send(self, event: dict[str, Any] | Exception | None) -> None:
        self._tell(self._events.put_nowait, event)

    def _tell(self, function: Callable[[Any], None], value: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, value)

    def _run(self) -> None:
        eos_ids = self._server.engine.eos_ids
        try:
            (found,) = beam_search(self._space, [self._prompt], self._params, eos_ids)
            self._send(best_event(self._server, self._space.steps, found))
            self._send(None)
        except UserError as error:
            self._send(bad_request(str(error)))
        except OutOfBlocks as error:
            self._send(cache_full(error))
        except Exception as error:  # an ApiError too
            self._send(error)
        finally:
            self._space.close()
            self._tell(self._at_end, self)


class SharedSpace:
    """The sequences of one search in the engine's pool, for a thread that is not the engine's (plinth.inference.beam.Space).

    Forks and frees wait for the next call of the model and run with it, so that a step is one visit to the engine's thread.
    Tells `send` of each step: the sequences that it extends, and where each came from.
    """

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, send: Callable[[dict[str, Any]], None]):
        self._server, self._loop, self._send = server, loop, send
        self._space: SequenceSpace | None = None
        self._pending: list[Callable[[], None]] = []
        self._handles: dict[int, int] = {}  # ours to the engine's
        self._paths: dict[int, tuple[tuple[int, ...], float, torch.Tensor]] = {}  # completion, its log-probability, what may follow
        self._next = 0
        self.steps: list[list[Node]] = []
        self.cancelled = False

    @property
    def engine_space(self) -> SequenceSpace:
        """The sequences themselves, for the engine's thread."""
        assert self._space is not None, "start comes first"
        return self._space

    def start(self, prompt: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Read the prompt."""

        def begin() -> tuple[int, torch.Tensor]:
            self._space = self._server.engine.search()
            return self._space.start(prompt)

        handle, logits_V = self._call(begin)
        ours = self._new(handle)
        self._paths[ours] = ((), 0.0, logits_V.float().log_softmax(-1))
        return ours, logits_V

    def extend(self, handles: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add a token to each; what the engine returns is copied, because others use it between two steps."""
        parents = [self._paths[handle] for handle in handles]
        nodes = [Node((*path, token), logprob + float(next_V[token])) for (path, logprob, next_V), token in zip(parents, tokens)]
        self.steps.append(nodes)
        self._send({"beams": [beam_entry(self._server, self.steps, len(self.steps) - 1, node) for node in nodes]})
        logits_MV = self._call(lambda: self.engine_space.extend([self._handles[handle] for handle in handles], tokens).clone())
        for handle, node, logprobs_V in zip(handles, nodes, logits_MV.float().log_softmax(-1)):
            self._paths[handle] = (node.tokens, node.logprob, logprobs_V)
        return logits_MV

    def fork(self, handle: int) -> int:
        """Return a handle to a copy, made before the next call of the model."""
        ours = self._new(None)
        self._paths[ours] = self._paths[handle]
        self._pending.append(lambda: self._handles.update({ours: self.engine_space.fork(self._handles[handle])}))
        return ours

    def free(self, handle: int) -> None:
        """Drop a sequence before the next call of the model."""
        self._paths.pop(handle)
        self._pending.append(lambda: self.engine_space.free(self._handles.pop(handle)))

    def close(self) -> None:
        """Drop all that is left, however long the queue; where the server stops, the engine goes with it."""
        self._pending.clear()
        self.cancelled = False
        while self._space is not None:
            try:
                self._call(self._space.close)
                return
            except ApiError as error:
                if error.status == 503:
                    return
                time.sleep(RETRY_S)

    def _new(self, handle: int | None) -> int:
        self._next += 1
        if handle is not None:
            self._handles[self._next] = handle
        return self._next

    def _call(self, function: Callable[[], Any]) -> Any:
        if self.cancelled:
            raise ApiError(499, "The client is gone.", code="client_gone")
        pending, self._pending = self._pending, []

        def run() -> Any:
            for action in pending:
                action()
            return function()

        return asyncio.run_coroutine_threadsafe(self._server.batcher.call(run), self._loop).result()


def beam_entry(server: Server, steps: list[list[Node]], step: int, node: Node) -> dict[str, Any]:
    """Return a beam for the page; `parent` is its place in the step before, -1 at the first step."""
    parent = next((i for i, other in enumerate(steps[step - 1]) if other.tokens == node.tokens[:-1]), -1) if step else -1
    return {"parent": parent, "token": describe(server.tokenizer, node.tokens[-1], 0.0), "logprob": node.logprob, "ended": False}


def best_event(server: Server, steps: list[list[Node]], found: list[Beam]) -> dict[str, Any]:
    """Return the best texts; `ends` are the beams that they end in, with the step that each belongs to."""
    end_id = server.engine.eos_ids[0] if server.engine.eos_ids else 0
    counts = [len(nodes) for nodes in steps] + [0]
    best, ends = [], []
    for beam in found:
        ended = beam.finish_reason == "stop"
        path = (*beam.tokens, end_id) if ended else tuple(beam.tokens)
        step = len(path) - 1
        entry = beam_entry(server, steps, step, Node(path, beam.logprob)) | {"step": step, "ended": ended}
        ends.append(entry)
        said = {"text": server.tokenizer.decode(beam.tokens), "logprob": beam.logprob, "score": beam.score, "count": len(beam.tokens)}
        best.append(said | {"ended": ended, "step": step, "beam": counts[step]})
        counts[step] += 1
    return {"ends": ends, "best": best}
