"""Tokens in, tokens out: continuous batching over a pool of blocks of keys and values.

Every step is one call of the model with the rows of all running requests: one row for each that decodes (more where the
next tokens are forced by a grammar or guessed by a drafter), parts of the prompts of those that have just come. Requests
join when there is room for all that they may need and leave when they end or are cancelled.

The law of this engine: what a request gets, tokens and log-probabilities, is the same bit for bit whatever else runs
beside it, whenever it came, whatever of its prompt was known already, and whatever was guessed for it. It rests on the
law of runners (plinth.inference.runner) and on noise that belongs to a request alone (plinth.inference.sampling).
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from plinth.config import UserError
from plinth.inference.answer_cache import AnswerCache
from plinth.inference.blocks import BlockPool, OutOfBlocks, num_blocks
from plinth.inference.constraint import Constraint
from plinth.inference.drafting import Drafter
from plinth.inference.penalties import TokenCounts
from plinth.inference.request import Collected, Completion, Counters, Event, Request, TopLogprobs, each_params
from plinth.inference.runner import BLOCK_TOKENS, Runner
from plinth.inference.sampling import fresh_seed
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.scheduler import Scheduler
from plinth.inference.scoring import Scorer, scored_rows
from plinth.inference.search import SequenceSpace
from plinth.inference.steps import Step
from plinth.inference.torch_runner import TorchRunner
from plinth.models.transformer import Transformer

__all__ = ["Completion", "Counters", "Engine", "Event", "each_params"]
DEFAULT_MEMORY_SHARE = 4  # without max_cache_bytes the cache takes a quarter of the machine's memory at most


class Engine:
    """Runs requests on one model. Not for use from several threads at once.

    model: a Transformer, run as it is in PyTorch, or a runner. max_batch: requests that run at once; more wait.
    max_seq_len: prompt and completion tokens of one request together, the model's own limit by default. eos_ids: tokens
    that end every completion. max_cache_bytes: memory bound of keys and values, by default what max_batch requests of
    max_seq_len need, but no more than a quarter of the machine's memory; requests wait for what they need of it.
    prefix_caching: whether prompts share what they begin with.
    """

    def __init__(
        self,
        model: Transformer | Runner,
        *,
        max_batch: int = 32,
        max_seq_len: int | None = None,
        eos_ids: Sequence[int] = (),
        max_cache_bytes: int | None = None,
        prefix_caching: bool = True,
    ):
        self.runner: Runner = TorchRunner(model) if isinstance(model, Transformer) else model
        limit = self.runner.max_seq_len
        if max_batch < 1:
            raise UserError(f"max_batch={max_batch} must be at least 1.")
        if max_seq_len is not None and not 2 <= max_seq_len <= limit:
            raise UserError(f"max_seq_len={max_seq_len} is not between 2 and the model's own limit, {limit}.")
        self.max_batch = max_batch
        self.max_seq_len = max_seq_len or limit
        self.eos_ids = tuple(eos_ids)
        self.vocab_size, self.device = self.runner.vocab_size, self.runner.device
        spare = num_blocks(self.max_seq_len)  # so that scoring never waits for requests
        self.pool = BlockPool(self._blocks_within(max_cache_bytes, spare), prefix_caching=prefix_caching)
        self.runner.allocate(self.pool.num_blocks)
        self.counters = Counters()
        self._scheduler = Scheduler(self.pool, self.max_batch, self.max_seq_len, spare)
        self._scorer = Scorer(self.runner, self.pool, self.max_seq_len)
        self.drafting: Callable[[SamplingParams, int, int], Drafter] | None = None
        """makes a drafter, from parameters, seed and prompt length, for each request that brings none; None = no guesses"""
        self.answers: AnswerCache | None = None
        """keeps answers that would come out the same again, and gives them in place of the model"""
        self._known: deque[Event] = deque()  # events of answers that were kept
        self._growing: dict[int, tuple[np.ndarray, SamplingParams, list[Event]]] = {}  # answers that are to be kept
        self._next_id = 0

    def _blocks_within(self, max_cache_bytes: int | None, blocks_each: int) -> int:
        wanted, least, block_bytes = (self.max_batch + 1) * blocks_each, 2 * blocks_each, self.runner.block_bytes()
        if max_cache_bytes is None:
            memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return max(least, min(wanted, memory_bytes // DEFAULT_MEMORY_SHARE // block_bytes))
        if max_cache_bytes < (least + 1) * block_bytes:
            raise UserError(
                f"max_cache_bytes={max_cache_bytes} is less than the {(least + 1) * block_bytes} bytes that one request of "
                f"max_seq_len={self.max_seq_len} tokens and scoring beside it need. Raise it or lower max_seq_len."
            )
        return min(wanted, max_cache_bytes // block_bytes - 1)

    @property
    def num_active(self) -> int:
        """Requests that have not ended, those that wait too."""
        scheduler = self._scheduler
        return len(scheduler.decoding) + len(scheduler.reading) + len(scheduler.waiting) + len({event.id for event in self._known})

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place, for blocks, or for another to read the prefix that they share."""
        return len(self._scheduler.waiting)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        constraint: Constraint | None = None,
        drafter: Drafter | None = None,
    ) -> int:
        """Queue a request and return its id; it starts at the next step that finds room for it.

        A constraint and a drafter belong to the request from now on. Raises UserError when the prompt is empty, does not
        fit the context, or holds an id outside the vocabulary.
        """
        params = params or SamplingParams()
        params.check_ids(self.vocab_size)
        tokens = self._checked(prompt, self.max_seq_len - 1, "prompt")
        if not len(tokens):
            raise UserError("prompt is empty: the model needs at least one token to go on from.")
        if self._take_known(tokens, params, constraint):
            return self._next_id - 1
        seed = (fresh_seed() if params.seed is None else params.seed) % 2**64
        if drafter is None and self.drafting is not None:
            drafter = self.drafting(params, seed, len(tokens))
        request = Request(
            id=self._next_id,
            prompt=tokens,
            params=params,
            seed=seed,
            stop_ids=params.end_ids(self.eos_ids),
            max_tokens=min(params.max_tokens, self.max_seq_len - len(tokens)),
            constraint=constraint,
            drafter=drafter,
            tokens=tokens.tolist(),
            first_block=tokens[:BLOCK_TOKENS].tobytes(),
            history=TokenCounts(tokens) if params.needs_history else None,
        )
        self._next_id += 1
        self._scheduler.waiting.append(request)
        return request.id

    def _take_known(self, prompt: np.ndarray, params: SamplingParams, constraint: Constraint | None) -> bool:
        """Queue the events of a kept answer and return whether there is one; else see to it that the new one is kept."""
        if self.answers is None or constraint is not None or params.prompt_logprobs is not None:
            return False
        events = self.answers.get(prompt, params)
        if events is None:
            if self.answers.key(prompt, params) is not None:
                self._growing[self._next_id] = (prompt, params, [])
            return False
        self._known += [replace(event, id=self._next_id) for event in events]
        self.counters.known_answers += 1
        self._next_id += 1
        return True

    def _checked(self, tokens: Sequence[int], limit: int, name: str) -> np.ndarray:
        if len(tokens) > limit:
            raise UserError(
                f"{name} has {len(tokens)} tokens; the context of {self.max_seq_len} tokens holds a {name} of at most {limit}. Shorten it."
            )
        array = np.array([int(token) for token in tokens], np.int64)
        wrong = array[(array < 0) | (array >= self.vocab_size)]
        if len(wrong):
            raise UserError(f"{name} holds token id {wrong[0]}; the vocabulary has ids 0 to {self.vocab_size - 1}.")
        return array.astype(np.int32)

    def cancel(self, request_id: int) -> None:
        """Drop a request and free its blocks at once; an id that has ended is no error."""
        self._growing.pop(request_id, None)
        self._known = deque(event for event in self._known if event.id != request_id)
        self._scheduler.remove(request_id)

    def end(self, request_id: int) -> None:
        """Drop a request whose text is whole, since a stop string was met; its answer may be kept."""
        self._keep(request_id)
        self.cancel(request_id)

    def _keep(self, request_id: int) -> None:
        if (growing := self._growing.pop(request_id, None)) is not None and self.answers is not None:
            self.answers.put(*growing)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run the model once for all running requests; return the tokens that it gave, those of a request in order.

        A step that only reads prompts returns no events. Raises OutOfBlocks where nothing can run because of an open search.
        """
        if self._known:
            events, self._known = list(self._known), deque()
            return events
        self._scheduler.admit()
        step = Step(self._scheduler, self.runner, self.counters, self.eos_ids, scored_rows(self.vocab_size))
        if step.is_empty:
            if self.num_waiting:
                raise OutOfBlocks(f"{self.num_waiting} requests wait for blocks that an open search holds. Close it first.")
            return []
        events = step.run()
        for event in events:
            if event.id in self._growing:
                self._growing[event.id][2].append(event)
            if event.finish_reason:
                self._scheduler.remove(event.id)
        bad = next((event for event in events if math.isnan(event.logprob)), None)
        if bad is not None:
            self.cancel(bad.id)
            raise UserError("the model gives scores that are not numbers: its weights are damaged or its training diverged.")
        if self._growing:
            for event in events:
                if event.finish_reason:
                    self._keep(event.id)
        return events

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        constraints: Sequence[Constraint | None] | None = None,
        drafters: Sequence[Drafter | None] | None = None,
    ) -> list[Completion]:
        """Complete all prompts, as many at once as there is room for; `params` is one for all, or one each.

        Raises UserError as `add` does, before anything runs; RuntimeError while other requests are active.
        """
        if self.num_active:
            raise RuntimeError("generate needs an idle engine; use add and step to mix requests.")
        nothing = [None] * len(prompts)
        each = zip(prompts, each_params(params, len(prompts)), constraints or nothing, drafters or nothing)
        collected: dict[int, Collected] = {}
        try:
            for request in each:
                collected[self.add(*request)] = Collected()
            while self.num_active:
                for event in self.step():
                    collected[event.id].push(event)
        finally:
            for request_id in collected:
                self.cancel(request_id)
        return [gathered.completion(len(prompt)) for gathered, prompt in zip(collected.values(), prompts)]

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log-probabilities in nats of tokens[1:] given what stands before each, for every sequence.

        Works beside running requests. Raises UserError when a sequence does not fit the context.
        """
        return [[logprob for logprob, _ in places] for places in self.score_alternatives(sequences, 0)]

    @torch.inference_mode()
    def score_alternatives(self, sequences: Sequence[Sequence[int]], count: int) -> list[list[tuple[float, TopLogprobs]]]:
        """Return, as `score` does, each log-probability with the `count` most probable (token id, log-probability) there."""
        return self._scorer.score([self._checked(sequence, self.max_seq_len, "sequence") for sequence in sequences], count)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Sequence[int]], pooling: str = "mean") -> torch.Tensor:
        """Return one vector a prompt, float32 (P, D): the mean of its hidden states after the last norm, or the last of them.

        Works beside running requests. Raises UserError as `score` does, and for an empty prompt.
        """
        if pooling not in ("mean", "last"):
            raise UserError(f"pooling={pooling!r} is not known. Use 'mean' or 'last'.")
        checked = [self._checked(prompt, self.max_seq_len, "prompt") for prompt in prompts]
        if not all(map(len, checked)):
            raise UserError("prompt is empty: there is nothing to embed.")
        return self._scorer.embed(checked, pooling)

    def search(self) -> SequenceSpace:
        """Return a space of sequences that grow token by token under the caller's control, beside running requests."""
        return SequenceSpace(self.runner, self.pool, self.max_seq_len, self._checked)

    def reload(self, model: Transformer) -> None:
        """Go on with the weights of `model`, which may be the same object with new values; what was read before is forgotten.

        Raises RuntimeError while requests run, UserError for a model of another configuration.
        """
        self.forget_prefixes()
        self.runner.reload(model)
        self.answers = None  # they were those of the old weights

    def forget_prefixes(self) -> None:
        """Forget what was read of earlier prompts. Raises RuntimeError while requests run."""
        if self.num_active:
            raise RuntimeError("an idle engine is needed: running requests hold what would be forgotten.")
        self.pool.forget_all()

    def check_integrity(self) -> None:
        """Assert that every place and block is free or belongs to a running request; for tests, with no search open."""
        self._scheduler.check_integrity()
