"""Generation by models that the paged engine does not run: one token a row a call, with a state of the model's own.

Encoder-decoders and recurrent models take part in it. A model that follows `StepModel` gets greedy decoding, sampling (the engine's own
chooser of tokens) and beam search (the engine's own) from here. Unlike in the engine, a row's last bits may depend on its company.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from plinth.config import UserError
from plinth.inference.penalties import TokenCounts
from plinth.inference.request import Collected, Completion, Event, each_params
from plinth.inference.sampling import Chosen, choose_tokens, fresh_seed
from plinth.inference.sampling_params import SamplingParams


class StepState(Protocol):
    """Where the rows of a batch are. It never changes: a step gives a new one, so that rows may go on from one state more than once."""

    def select(self, rows_B: torch.Tensor) -> StepState:
        """Return the state of some rows, int64, any of them any number of times."""


class StepModel(Protocol):
    """A model that reads one token a row a call."""

    def encode(self, source_BS: torch.Tensor, source_mask_BS: torch.Tensor) -> Any:
        """Return what the decoder looks at of padded sources, whose mask is True on tokens; None for a language model."""

    def begin(self, memory: Any, rows: int) -> Any:
        """Return the state before the first token of `rows` rows; a memory has that many."""

    def step(self, tokens_B: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """Read a token a row; return the scores of the next, float32 (B, V), and the state behind it."""


class StepSpace:
    """Sequences by handle on a `StepModel`, with the face that `beam_search` takes.

    With `start_id` the model is an encoder-decoder: a prompt is a source, and its decoder starts from that token. Without, a prompt is
    text that the model goes on from. Sequences that `start_all` began, and those that grew from them, run as rows of one call.
    """

    def __init__(self, model: StepModel, start_id: int | None = None, pad_id: int = 0):
        self._model, self._start_id, self._pad_id = model, start_id, pad_id
        self._places: dict[int, tuple[StepState, int]] = {}
        self._ready: dict[tuple[int, ...], tuple[StepState, int, torch.Tensor]] = {}
        self._next_handle = 0

    @property
    def num_sequences(self) -> int:
        return len(self._places)

    def prepare(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts together; `start` then has them ready. Those of a language model share a call where they are equally long."""
        groups: dict[int, list[tuple[int, ...]]] = {}
        for prompt in dict.fromkeys(tuple(map(int, prompt)) for prompt in prompts):
            groups.setdefault(len(prompt) if self._start_id is None else 0, []).append(prompt)
        for group in groups.values():
            logits_NV, state = self._read(group)
            for row, prompt in enumerate(group):
                self._ready[prompt] = (state, row, logits_NV[row])

    def start(self, prompt: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Return a handle and the scores behind the prompt, float32 (V,). Raises UserError for an empty prompt."""
        key = tuple(map(int, prompt))
        if key not in self._ready:
            self.prepare([key])
        state, row, logits_V = self._ready[key]
        return self._add((state, row)), logits_V.clone()

    @torch.inference_mode()
    def extend(self, handles: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add a token to each of M different sequences; return the scores behind it, float32 (M, V)."""
        assert len(set(handles)) == len(handles) == len(tokens), "each sequence takes one token in a call"
        groups: dict[int, list[int]] = {}
        for i, handle in enumerate(handles):
            groups.setdefault(id(self._places[handle][0]), []).append(i)
        parts = []
        for members in groups.values():
            state = self._places[handles[members[0]]][0]
            rows = torch.tensor([self._places[handles[i]][1] for i in members])
            logits_NV, new = self._model.step(torch.tensor([int(tokens[i]) for i in members]), state.select(rows))
            parts.append(logits_NV)
            for row, i in enumerate(members):
                self._places[handles[i]] = (new, row)
        order = [i for members in groups.values() for i in members]
        return torch.cat(parts)[np.argsort(order, kind="stable")] if len(parts) > 1 else parts[0]

    def fork(self, handle: int) -> int:
        """Return a handle to a second sequence with the same tokens; it costs nothing."""
        return self._add(self._places[handle])

    def free(self, handle: int) -> None:
        """Drop a sequence."""
        del self._places[handle]

    def _add(self, place: tuple[StepState, int]) -> int:
        self._next_handle += 1
        self._places[self._next_handle] = place
        return self._next_handle

    @torch.inference_mode()
    def _read(self, prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, StepState]:
        """Return the scores behind prompts, float32 (N, V), and the state there."""
        if not all(prompts):
            raise UserError("prompt is empty: the model needs at least one token to go on from.")
        if self._start_id is None:
            tokens_NT, memory = torch.tensor(prompts), None
        else:
            source_NS, mask_NS = _padded(prompts, self._pad_id)
            tokens_NT, memory = torch.full((len(prompts), 1), self._start_id), self._model.encode(source_NS, mask_NS)
        state = self._model.begin(memory, len(prompts))
        for tokens_N in tokens_NT.unbind(1):
            logits_NV, state = self._model.step(tokens_N, state)
        return logits_NV, state


def _padded(rows: list[tuple[int, ...]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths_N = torch.tensor([len(row) for row in rows])
    width = int(lengths_N.max())
    tokens_NS = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    return tokens_NS, torch.arange(width) < lengths_N[:, None]


def sample_sequences(
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    eos_ids: Collection[int] = (),
    *,
    start_id: int | None = None,
    pad_id: int = 0,
    max_seq_len: int | None = None,
) -> list[Completion]:
    """Complete prompts (sources, for an encoder-decoder with a `start_id`) in one batch; `params` is one for all (seed + i for prompt i),
    or one each.

    max_seq_len: tokens that a completion may have at most, beside max_tokens; a language model's prompt counts too. Without a seed a
    prompt gets a fresh one; the token at a place depends on the seed, the place and the scores alone.
    """
    each = each_params(params, len(prompts))
    space = StepSpace(model, start_id, pad_id)
    space.prepare(prompts)
    rows = [_Row(space, prompt, one, eos_ids, start_id is None, max_seq_len) for prompt, one in zip(prompts, each)]
    running, logits_NV = rows, torch.stack([row.logits_V for row in rows]) if rows else torch.empty(0)
    while running:
        chosen = choose_tokens(
            logits_NV.float(), [row.params for row in running], [row.seed for row in running], [row.count for row in running],
            [row.history for row in running], eos_ids=eos_ids,
        )  # fmt: skip
        for i, row in enumerate(running):
            row.take(chosen, i)
        running = [row for row in running if not row.found.finish_reason]
        if running:
            logits_NV = space.extend([row.handle for row in running], [row.last for row in running])
    return [row.found.completion(len(prompt)) for row, prompt in zip(rows, prompts)]


class _Row:
    """One completion as it grows."""

    def __init__(self, space: StepSpace, prompt, params: SamplingParams, eos_ids: Collection[int], is_text: bool, max_seq_len: int | None):
        self.handle, self.logits_V = space.start(prompt)
        self.params, self.seed, self.count, self.last = params, fresh_seed() if params.seed is None else params.seed % 2**64, 0, -1
        self.history = TokenCounts(prompt if is_text else ()) if params.needs_history else None
        self.limit = params.max_tokens if max_seq_len is None else min(params.max_tokens, max_seq_len - len(prompt) * is_text)
        if self.limit < 1:
            raise UserError(f"prompt has {len(prompt)} tokens; the context of {max_seq_len} tokens leaves no room behind it. Shorten it.")
        self.found, self._ends = Collected(), params.end_ids(eos_ids)

    def take(self, chosen: Chosen, i: int) -> None:
        """Take the token that was chosen in row i."""
        token = self.last = chosen.tokens[i]
        self.count += 1
        if self.history is not None and token >= 0:
            self.history.add(token)
        reason = "stop" if token in self._ends or token < 0 else "length" if self.count == self.limit else None
        self.found.push(Event(self.handle, token, chosen.logprobs[i], chosen.top_logprobs[i], reason))
