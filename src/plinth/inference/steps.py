"""One step of the engine: the rows of one model call, and what their logits mean for each request.

A request that decodes runs its last token and the tokens that are planned to follow it. At every row a token is drawn as
if that row were alone; a plan holds as far as it agrees with what was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from plinth.inference.penalties import TokenCounts
from plinth.inference.request import Counters, Event, Request
from plinth.inference.runner import BLOCK_TOKENS, Rows, Runner
from plinth.inference.sampling import Chosen, choose_tokens
from plinth.inference.scheduler import Scheduler
from plinth.inference.scoring import logprobs_of
from plinth.inference.turns import Turn, plan_turn

NO_TOKEN = -1  # where nothing is allowed, or nothing may follow and no token id means an end


class Step:
    """Gathers the rows of a step when made; `run` runs them and returns the events."""

    def __init__(self, scheduler: Scheduler, runner: Runner, counters: Counters, eos_ids: Sequence[int], max_scored_tokens: int):
        self._scheduler, self._pool, self._runner, self._counters = scheduler, scheduler.pool, runner, counters
        self._eos_ids = eos_ids
        self._turns = [plan_turn(request, runner.vocab_size) for request in scheduler.decoding.values()]
        self._parts = scheduler.prompt_parts(max_scored_tokens)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self._turns and not self._parts

    def run(self) -> list[Event]:
        """Run the model and let every request advance."""
        self._counters.steps += 1
        rows = self._rows()
        logits_MV = self._runner.forward(rows)
        if self._parts:
            self._finish_parts(logits_MV)
        return self._draw(logits_MV) if self._turns else []

    def _rows(self) -> Rows:
        tokens, positions, slots = [], [], []
        for turn in self._turns:
            request, run = turn.request, turn.row_tokens()
            first = len(request.tokens) - 1
            turn.source = len(tokens)
            tokens += run
            positions += range(first, first + len(run))
            slots += [request.slot] * len(run)
            self._pool.grow(request.sequence, first + len(run))
        columns = [np.array(column, np.int32) for column in (tokens, positions, slots)]
        wanted, prefill = np.arange(len(tokens), dtype=np.int32), np.zeros(len(tokens), bool)
        if self._parts:
            columns, wanted = self._with_parts(columns, wanted)
            prefill = np.arange(len(columns[0])) >= len(tokens)
        return Rows(*columns, block_tables=self._scheduler.tables, wanted=wanted, prefill=prefill)

    def _with_parts(self, columns: list[np.ndarray], wanted: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        pieces, extra, row = [columns], [wanted], len(wanted)
        for request, start, stop in self._parts:
            slots = np.full(stop - start, request.slot, np.int32)
            pieces.append([request.prompt[start:stop], np.arange(start, stop, dtype=np.int32), slots])
            first_wanted = stop - _num_wanted(request, start, stop)
            extra.append(np.arange(row + first_wanted - start, row + stop - start, dtype=np.int32))
            row += stop - start
        return [np.concatenate(column) for column in zip(*pieces)], np.concatenate(extra)

    def _finish_parts(self, logits_MV: torch.Tensor) -> None:
        """Note what was read; those whose prompt ends here, and their twins, draw their first token in this step."""
        source = sum(turn.num_choices for turn in self._turns)
        for request, start, stop in self._parts:
            count = _num_wanted(request, start, stop)
            if request.wants_prompt_logprobs:
                targets = request.prompt[start + 1 : stop + 1]
                scored = logprobs_of(logits_MV[source : source + len(targets)], targets, request.params.prompt_logprobs)
                request.prompt_logprobs += scored
            source += count
            request.sequence.tokens += request.prompt[start:stop].tolist()
            self._pool.publish(request.sequence, len(request.prompt))
            if stop == len(request.prompt):
                self._start_turns(request, source - 1)

    def _start_turns(self, request: Request, source: int) -> None:
        self._scheduler.finish_reading(request)
        twins, pairs = self._scheduler.start_twins(request)
        if pairs:
            self._runner.copy_blocks(pairs)
        self._counters.prompt_tokens += len(request.prompt) * (1 + len(twins))
        self._counters.cached_tokens += request.num_cached + len(request.prompt) * len(twins)
        for each in (request, *twins):
            mask = None if each.constraint is None else each.constraint.allowed()
            self._turns.append(Turn(each, masks=(mask,), source=source, runs=False))

    def _draw(self, logits_MV: torch.Tensor) -> list[Event]:
        rows = [turn.source + i for turn in self._turns for i in range(turn.num_choices)]
        if rows != list(range(len(logits_MV))):
            logits_MV = logits_MV[torch.tensor(rows, device=logits_MV.device)]
        chosen = self._choose(logits_MV)
        events: list[Event] = []
        first = 0
        for turn in self._turns:
            self._advance(turn, chosen, first, events)
            first += turn.num_choices
        self._counters.completion_tokens += len(events)
        return events

    def _choose(self, logits_NV: torch.Tensor) -> Chosen:
        turns = self._turns
        if len(turns) == len(logits_NV):
            requests, indices = [turn.request for turn in turns], [turn.request.num_generated for turn in turns]
        else:
            requests = [turn.request for turn in turns for _ in range(turn.num_choices)]
            indices = [turn.request.num_generated + i for turn in turns for i in range(turn.num_choices)]
        masks = histories = None
        if any(request.constraint is not None for request in requests):
            masks = [mask for turn in turns for mask in turn.masks]
        if any(request.history is not None for request in requests):
            histories = [history for turn in turns for history in _histories(turn)]
        params, seeds = [request.params for request in requests], [request.seed for request in requests]
        return choose_tokens(logits_NV, params, seeds, indices, histories, masks, eos_ids=self._eos_ids)

    def _advance(self, turn: Turn, chosen: Chosen, first: int, events: list[Event]) -> None:
        """Take the drawn tokens as far as they agree with the plan."""
        first_row = len(turn.request.tokens) - 1
        for i in range(turn.num_choices):
            token = chosen.tokens[first + i]
            event = Event(turn.request.id, token, chosen.logprobs[first + i], chosen.top_logprobs[first + i], None)
            events.append(event)
            if self._take(turn, i, event, events) or i >= len(turn.planned) or token != turn.planned[i]:
                break
        if turn.runs:
            self._note_written(turn, first_row, first_row + i + 1)

    def _take(self, turn: Turn, i: int, event: Event, events: list[Event]) -> bool:
        """Add a token to its request and return whether the request ends with it."""
        request, constraint = turn.request, turn.request.constraint
        if request.num_generated == 0 and request.wants_prompt_logprobs:
            event.prompt_logprobs = request.prompt_logprobs
        if event.token in request.stop_ids or event.token == NO_TOKEN:
            event.finish_reason = "stop"
            return True
        request.tokens.append(event.token)
        if request.history is not None:
            request.history.add(event.token)
        if constraint is not None and i >= turn.num_forced:
            constraint.advance(event.token)
        if constraint is not None and i >= turn.num_forced - 1 and constraint.finished():
            events.append(Event(request.id, next(iter(request.stop_ids), NO_TOKEN), 0.0, [], "stop"))
            return True
        if request.num_generated >= request.max_tokens:
            event.finish_reason = "length"
        return event.finish_reason is not None

    def _note_written(self, turn: Turn, first: int, written: int) -> None:
        """Note that the rows first..written of a request stand in the cache, those of refused guesses not among them."""
        request, sequence = turn.request, turn.request.sequence
        sequence.tokens += request.tokens[len(sequence.tokens) : written]
        if self._runner.uniform and written // BLOCK_TOKENS > sequence.num_published:
            self._pool.publish(sequence, written)
        if turn.num_forced:
            self._counters.forced_tokens += turn.num_forced
        elif turn.planned:
            accepted = written - first - 1
            self._counters.drafted += len(turn.planned)
            self._counters.accepted += accepted
            turn.request.drafter.observe(len(turn.planned), accepted)


def _num_wanted(request: Request, start: int, stop: int) -> int:
    """Return how many rows of this part of a prompt want logits."""
    return stop - start if request.wants_prompt_logprobs else int(stop == len(request.prompt))


def _histories(turn: Turn) -> list[TokenCounts | None]:
    """Return for each row the tokens that stand before the one to be drawn there."""
    history = turn.request.history
    if history is None:
        return [None] * turn.num_choices
    histories: list[TokenCounts | None] = [history]
    for token in turn.planned[: turn.num_choices - 1]:
        history = history.copy()
        history.add(token)
        histories.append(history)
    return histories
