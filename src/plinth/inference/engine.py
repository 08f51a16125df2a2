"""Tokens in, tokens out: continuous batching over a fixed number of cache slots.

Every step is one call of the model with the rows of all running requests: one row for each that decodes, chunks of the
prompts of those that have just come. Requests join when a slot is free and leave when they end or are cancelled.

The law of this engine: what a request gets, tokens and log-probabilities, is the same bit for bit whatever else runs
beside it, whenever it came, and however many slots there are. See plinth.ops.linear and plinth.inference.rows for how.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from plinth.config import UserError
from plinth.inference.rows import PREFILL_CHUNK, RowBatch, chunk_starts
from plinth.inference.sampling import SamplingColumns, SamplingParams, fresh_seed, sample_tokens, top_logprobs, uniform_noise
from plinth.models.kv_cache import KVCache
from plinth.models.transformer import Transformer
from plinth.ops.linear import pad_rows

PREFILL_ROWS = 256  # prompt tokens a step at most, so that those who decode wait little
SCORE_HEAD_ROWS = 64  # rows of logits held at once while scoring
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Event:
    """One token of one request."""

    id: int
    """the request, as `add` returned it"""
    token: int
    """token id; with finish_reason 'stop' it is the token that ended the completion and is no part of it"""
    logprob: float
    """log-probability in nats of the token under the raw model distribution, before temperature and truncation"""
    top_logprobs: list[tuple[int, float]]
    """(token id, log-probability in nats) of the most probable tokens, most probable first"""
    finish_reason: str | None
    """'stop', 'length', or None while the request goes on"""


@dataclass(frozen=True)
class Completion:
    """What the model wrote for one prompt."""

    tokens: list[int]
    """token ids without the one that ended it"""
    logprobs: list[float]
    """log-probability in nats of each token, raw model distribution"""
    top_logprobs: list[list[tuple[int, float]]]
    """the most probable tokens at each place, as many as were asked for"""
    finish_reason: str
    """'stop' (an end token) or 'length' (max_tokens, or the end of the context)"""
    prompt_tokens: int
    """length of the prompt in tokens"""


@dataclass(eq=False)
class _Request:
    """A request between `add` and its end."""

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int
    slot: int | None = None
    num_prefilled: int = 0
    num_generated: int = 0
    last_token: int = 0

    @property
    def decodes(self) -> bool:
        return self.slot is not None and self.num_prefilled == len(self.prompt)


@dataclass
class _Collected:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str = ""


class Engine:
    """Runs requests on one model. Not for use from several threads at once.

    max_batch: requests that run at once; more wait. max_seq_len: prompt and completion tokens of one request together,
    the model's own limit by default. eos_ids: tokens that end every completion. max_cache_bytes: memory bound of the
    key-value cache; where it does not hold max_batch slots there are fewer, and requests wait for them.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch: int = 32,
        max_seq_len: int | None = None,
        eos_ids: Sequence[int] = (),
        max_cache_bytes: int | None = None,
    ):
        limit = model.config.max_seq_len
        if max_batch < 1:
            raise UserError(f"max_batch={max_batch} must be at least 1.")
        if max_seq_len is not None and not 2 <= max_seq_len <= limit:
            raise UserError(f"max_seq_len={max_seq_len} is not between 2 and the model's own limit, {limit}.")
        self.model = model
        self.max_seq_len = max_seq_len or limit
        self.eos_ids = tuple(eos_ids)
        self.device = model.embed.weight.device
        self._dtype = model.embed.weight.dtype
        length = math.ceil(self.max_seq_len / PREFILL_CHUNK) * PREFILL_CHUNK  # whole prompt chunks
        self.max_batch = self._slots_within(max_cache_bytes, max_batch, length)
        # Two slots beyond those of requests: one that filling rows write to, one that is always free for scoring.
        self._scratch_slot, self._score_slot = self.max_batch, self.max_batch + 1
        self.cache = KVCache(model.config, self.max_batch + 2, length, self._dtype, self.device)
        self._free = list(range(self.max_batch))  # a heap: the lowest slot first, so that running slots lie side by side
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._next_id = 0

    def _slots_within(self, max_cache_bytes: int | None, max_batch: int, length: int) -> int:
        if max_cache_bytes is None:
            return max_batch
        config = self.model.config
        slot_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * self._dtype.itemsize
        slots = max_cache_bytes // slot_bytes - 2
        if slots < 1:
            raise UserError(
                f"max_cache_bytes={max_cache_bytes} is less than the {3 * slot_bytes} bytes that one request of "
                f"max_seq_len={self.max_seq_len} tokens needs. Raise it or lower max_seq_len."
            )
        return min(max_batch, slots)

    @property
    def num_active(self) -> int:
        """Requests that have not ended, those that wait for a slot too."""
        return len(self._running) + len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a request and return its id; it starts at the next step that finds a free slot.

        Raises UserError when the prompt is empty, does not fit the context, or holds an id outside the vocabulary.
        """
        params = params or SamplingParams()
        prompt = self._checked(prompt, self.max_seq_len - 1, "prompt")
        if not prompt:
            raise UserError("prompt is empty: the model needs at least one token to go on from.")
        request = _Request(
            id=self._next_id,
            prompt=prompt,
            params=params,
            seed=(fresh_seed() if params.seed is None else params.seed) % 2**64,
            stop_ids=frozenset(self.eos_ids) | frozenset(params.stop_token_ids),
            max_tokens=min(params.max_tokens, self.max_seq_len - len(prompt)),
        )
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def _checked(self, tokens: Sequence[int], limit: int, name: str) -> list[int]:
        tokens = [int(token) for token in tokens]
        if len(tokens) > limit:
            raise UserError(
                f"{name} has {len(tokens)} tokens; the context of {self.max_seq_len} tokens holds a {name} of at most {limit}. Shorten it."
            )
        vocab_size = self.model.config.vocab_size
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise UserError(f"{name} holds token id {token}; the vocabulary has ids 0 to {vocab_size - 1}.")
        return tokens

    def cancel(self, request_id: int) -> None:
        """Drop a request and free its slot at once; an id that has ended is no error."""
        request = self._running.pop(request_id, None)
        if request is not None:
            self._release(request)
        else:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.id != request_id)

    def _release(self, request: _Request) -> None:
        assert request.slot is not None and request.slot not in self._free
        heapq.heappush(self._free, request.slot)
        request.slot = None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run the model once for all running requests; return the tokens that it gave, at most one a request.

        A step that only reads prompts returns no events.
        """
        self._admit()
        decoding = [request for request in self._running.values() if request.decodes]
        batch = RowBatch()
        sources = batch.add_decode([(r.last_token, len(r.prompt) + r.num_generated - 1, r.slot) for r in decoding], self.cache)
        ready, ready_rows = self._add_prompts(batch)
        if not len(batch):
            return []
        hidden_ND = self._forward(batch)
        requests = decoding + ready
        return self._sample(requests, hidden_ND, sources + ready_rows) if requests else []

    def _admit(self) -> None:
        while self._waiting and self._free:
            request = self._waiting.popleft()
            request.slot = heapq.heappop(self._free)
            self._running[request.id] = request

    def _add_prompts(self, batch: RowBatch) -> tuple[list[_Request], list[int]]:
        """Add prompt chunks, first come first served; return the requests whose prompt ends here, and its last rows."""
        chunks, ends, room = [], [], PREFILL_ROWS // PREFILL_CHUNK
        for request in self._running.values():
            length = len(request.prompt)
            for start in chunk_starts(request.num_prefilled, length)[: room - len(chunks)]:
                chunks.append((request.prompt[start : start + PREFILL_CHUNK], start, request.slot))
                request.num_prefilled = min(start + PREFILL_CHUNK, length)
                if request.num_prefilled == length:
                    ends.append((request, len(chunks) - 1, length - 1 - start))
            if len(chunks) == room:
                break
        first_rows = batch.add_prefill(chunks, self.cache)
        return [request for request, _, _ in ends], [first_rows[chunk] + offset for _, chunk, offset in ends]

    def _forward(self, batch: RowBatch) -> torch.Tensor:
        return self.model.forward_rows(*batch.tensors(self._scratch_slot, self.device), self.cache, batch.spans)

    def _logits(self, hidden_ND: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return fp32 logits of some rows, filled up to whole tiles."""
        index = torch.tensor(list(rows) + [0] * (pad_rows(len(rows)) - len(rows)), device=self.device)
        return self.model.logits_rows(hidden_ND[index]).float()

    def _sample(self, requests: list[_Request], hidden_ND: torch.Tensor, rows: list[int]) -> list[Event]:
        logits_NV = self._logits(hidden_ND, rows)
        filling = [GREEDY] * (len(logits_NV) - len(requests))
        columns = SamplingColumns.of([request.params for request in requests] + filling, self.device)
        noise_N = np.zeros(len(logits_NV))
        if columns.any_sampled:
            seeds = np.array([request.seed for request in requests], dtype=np.uint64)
            noise_N[: len(requests)] = uniform_noise(seeds, np.array([request.num_generated for request in requests]))
        tokens_N = sample_tokens(logits_NV, columns, torch.from_numpy(noise_N).to(self.device))
        logprobs_NV = torch.log_softmax(logits_NV, -1)
        chosen = logprobs_NV.gather(-1, tokens_N[:, None])[:, 0].tolist()
        alternatives = _alternatives(requests, logprobs_NV)
        return [
            self._advance(request, token, logprob, top)
            for request, token, logprob, top in zip(requests, tokens_N.tolist(), chosen, alternatives)
        ]

    def _advance(self, request: _Request, token: int, logprob: float, top: list[tuple[int, float]]) -> Event:
        if math.isnan(logprob):
            self.cancel(request.id)
            raise UserError("the model gives scores that are not numbers: its weights are damaged or its training diverged.")
        request.num_generated += 1
        request.last_token = token
        reason = "stop" if token in request.stop_ids else "length" if request.num_generated >= request.max_tokens else None
        if reason:
            del self._running[request.id]
            self._release(request)
        return Event(request.id, token, logprob, top, reason)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete all prompts, as many at once as there are slots; `params` is one for all, or one each.

        Raises UserError as `add` does, before anything runs; RuntimeError while other requests are active.
        """
        if self.num_active:
            raise RuntimeError("generate needs an idle engine; use add and step to mix requests.")
        each = each_params(params, len(prompts))
        ids: list[int] = []
        try:
            for prompt, wanted in zip(prompts, each):
                ids.append(self.add(prompt, wanted))
            collected = {request_id: _Collected() for request_id in ids}
            while self.num_active:
                for event in self.step():
                    _collect(collected[event.id], event)
        finally:
            for request_id in ids:
                self.cancel(request_id)
        return [
            Completion(c.tokens, c.logprobs, c.top_logprobs, c.finish_reason, len(prompt))
            for c, prompt in zip((collected[request_id] for request_id in ids), prompts)
        ]

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log-probabilities in nats of tokens[1:] given what stands before each, for every sequence.

        Works beside running requests. Raises UserError when a sequence does not fit the context.
        """
        return [[logprob for logprob, _ in places] for places in self.score_alternatives(sequences, 0)]

    @torch.inference_mode()
    def score_alternatives(self, sequences: Sequence[Sequence[int]], count: int) -> list[list[tuple[float, list[tuple[int, float]]]]]:
        """Return, as `score` does, each log-probability with the `count` most probable (token id, log-probability) there."""
        checked = [self._checked(sequence, self.max_seq_len, "sequence") for sequence in sequences]
        slots = [self._score_slot, *sorted(self._free)]
        scores: list[list[tuple[float, list[tuple[int, float]]]]] = []
        for start in range(0, len(checked), len(slots)):
            scores += self._score_group(checked[start : start + len(slots)], slots, count)
        return scores

    def _score_group(self, sequences: list[list[int]], slots: list[int], count: int) -> list[list[tuple[float, list[tuple[int, float]]]]]:
        scores = [[(0.0, [])] * max(0, len(sequence) - 1) for sequence in sequences]
        pieces = sorted((start, i) for i, tokens in enumerate(sequences) for start in chunk_starts(0, len(tokens) - 1))
        per_call = PREFILL_ROWS // PREFILL_CHUNK
        for begin in range(0, len(pieces), per_call):
            part = pieces[begin : begin + per_call]
            batch = RowBatch()
            chunks = [(sequences[i][start : start + PREFILL_CHUNK], start, slots[i]) for start, i in part]
            first_rows = batch.add_prefill(chunks, self.cache)
            hidden_ND = self._forward(batch)
            wanted = [
                (row + offset, i, start + offset)
                for row, (start, i) in zip(first_rows, part)
                for offset in range(min(PREFILL_CHUNK, len(sequences[i]) - 1 - start))
            ]
            for at in range(0, len(wanted), SCORE_HEAD_ROWS):
                rows = wanted[at : at + SCORE_HEAD_ROWS]
                targets = torch.tensor([sequences[i][position + 1] for _, i, position in rows], device=self.device)
                logprobs_NV = torch.log_softmax(self._logits(hidden_ND, [row for row, _, _ in rows]), -1)
                values = logprobs_NV[: len(rows)].gather(-1, targets[:, None])[:, 0].tolist()
                alternatives = top_logprobs(logprobs_NV[: len(rows)], count)
                for value, top, (_, i, position) in zip(values, alternatives, rows):
                    scores[i][position] = (value, top)
        return scores


def each_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Return one SamplingParams a prompt. With one seed for several prompts, prompt i gets seed + i."""
    if params is None or isinstance(params, SamplingParams):
        shared = params or SamplingParams()
        if shared.seed is None:
            return [shared] * count
        return [replace(shared, seed=shared.seed + i) for i in range(count)]
    if len(params) != count:
        raise UserError(f"params has {len(params)} entries for {count} prompts. Give one for all, or one for each.")
    return list(params)


def _collect(collected: _Collected, event: Event) -> None:
    if event.finish_reason != "stop":
        collected.tokens.append(event.token)
        collected.logprobs.append(event.logprob)
        collected.top_logprobs.append(event.top_logprobs)
    collected.finish_reason = event.finish_reason or ""


def _alternatives(requests: list[_Request], logprobs_NV: torch.Tensor) -> list[list[tuple[int, float]]]:
    """Return the alternatives that each request asked for; rows that want the same number are found together."""
    found: list[list[tuple[int, float]]] = [[] for _ in requests]
    for count in {request.params.logprobs or 0 for request in requests} - {0}:
        rows = [i for i, request in enumerate(requests) if request.params.logprobs == count]
        for i, top in zip(rows, top_logprobs(logprobs_NV[rows], count)):
            found[i] = top
    return found
