"""Beam search: the most probable completions that a search of bounded width finds, in groups that differ where asked for.

All beams of all prompts run as rows of one model call a step. The rules by which beams end and a search stops are those of
transformers' generate, so that the same weights give the same text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from plinth.config import UserError
from plinth.inference.sampling import largest_logprobs, peaks


@dataclass(frozen=True)
class BeamParams:
    """How wide to search, how long, and what is best."""

    num_beams: int = 4
    """completions that are followed at once, those of all groups"""
    max_tokens: int = 128
    """completion tokens at most; the context of the model bounds it too"""
    length_penalty: float = 1.0
    """a completion's score is its log-probability divided by its length, the end included, to this power; 0 = not divided"""
    early_stopping: bool | Literal["never"] = False
    """when to stop once num_beams completions have ended: True = at once; False = when the running ones, at their present length,
    are no better; 'never' = when they could not become better at any length"""
    num_return: int = 1
    """completions to return, best first"""
    num_groups: int = 1
    """groups that the beams are divided into; each searches for itself"""
    diversity_penalty: float = 0.0
    """nats taken off a token for each time that an earlier group has taken it at the same place"""

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_tokens", "num_return", "num_groups"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value!r} is not a whole number of at least 1.")
        if self.num_beams % self.num_groups:
            raise UserError(f"num_beams={self.num_beams} is not a multiple of num_groups={self.num_groups}. Change one of them.")
        if self.num_return > self.num_beams:
            raise UserError(f"num_return={self.num_return} is more than num_beams={self.num_beams}. Search wider or return fewer.")
        if self.early_stopping not in (True, False, "never"):
            raise UserError(f"early_stopping={self.early_stopping!r} is none of True, False and 'never'.")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty={self.length_penalty!r} is not a finite number.")
        if not (math.isfinite(self.diversity_penalty) and self.diversity_penalty >= 0):
            raise UserError(f"diversity_penalty={self.diversity_penalty!r} must be 0 or more.")
        if self.diversity_penalty and self.num_groups == 1:
            raise UserError(f"diversity_penalty={self.diversity_penalty} does nothing in one group. Set num_groups, at most num_beams.")


@dataclass(frozen=True)
class Beam:
    """One completion that a search has found."""

    tokens: list[int]
    """token ids without the one that ended it"""
    score: float
    """what it is ranked by: logprob over length to the power of length_penalty"""
    logprob: float
    """log-probability of the whole completion in nats, its end included"""
    finish_reason: str
    """'stop' (an end token) or 'length'"""


class Space(Protocol):
    """Sequences that grow token by token; `Engine.search()` returns one."""

    def start(self, prompt: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Return a handle and the logits behind the prompt, float32 (V,)."""

    def extend(self, handles: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add a token to each of M sequences and return the logits behind it, float32 (M, V)."""

    def fork(self, handle: int) -> int:
        """Return a handle to a copy."""

    def free(self, handle: int) -> None:
        """Drop a sequence."""


def beam_search(
    space: Space, prompts: Sequence[Sequence[int]], params: BeamParams, eos_ids: Collection[int] = (), *, max_seq_len: int | None = None
) -> list[list[Beam]]:
    """Return the best num_return completions of each prompt, best first.

    max_seq_len: prompt and completion tokens together, where that is less than what max_tokens allows. Raises UserError when a
    prompt leaves no room in it, and what `space` raises.
    """
    limits = [params.max_tokens if max_seq_len is None else min(params.max_tokens, max_seq_len - len(prompt)) for prompt in prompts]
    for prompt, limit in zip(prompts, limits):
        if limit < 1:
            raise UserError(f"prompt has {len(prompt)} tokens; the context of {max_seq_len} tokens leaves no room behind it. Shorten it.")
    searches: list[_Search] = []
    try:
        for prompt, limit in zip(prompts, limits):
            searches.append(_Search(space, prompt, params, frozenset(eos_ids), limit))
        while running := [search for search in searches if search.running]:
            beams = [beam for search in running for beam in search.running]
            logits_NV = space.extend([beam.handle for beam in beams], [beam.tokens[-1] for beam in beams])
            start = 0
            for search in running:
                stop = start + len(search.running)
                search.advance(logits_NV[start:stop])
                start = stop
    finally:
        for search in searches:
            search.close()
    return [search.best() for search in searches]


@dataclass(eq=False)
class _Running:
    """A completion that goes on. Its last token has not run yet."""

    handle: int
    tokens: list[int]
    logprob: np.float32


class _Search:
    """The search for one prompt."""

    def __init__(self, space: Space, prompt: Sequence[int], params: BeamParams, eos_ids: frozenset[int], max_tokens: int):
        self._space, self._params = space, params
        width = params.num_beams // params.num_groups
        self._groups = [_Group(width, params, eos_ids, max_tokens) for _ in range(params.num_groups)]
        handle, logits_V = space.start(prompt)
        root = _Running(handle, [], np.float32(0.0))
        for group in self._groups:
            group.running = [root]
        self._advance([root], logits_V[None])

    @property
    def running(self) -> list[_Running]:
        return [beam for group in self._groups for beam in group.running]

    def advance(self, logits_NV: torch.Tensor) -> None:
        """Take the logits behind the last token of each running beam, in order."""
        self._advance(self.running, logits_NV)

    def _advance(self, beams: list[_Running], logits_NV: torch.Tensor) -> None:
        params, taken = self._params, Counter[int]()
        width, num_ends = self._groups[0].width, len(self._groups[0].eos_ids)
        # Enough for every running beam to go on should all ends come first, and as many more as penalties can push down.
        wanted = max(2, 1 + num_ends) * width + (params.num_beams - width if params.diversity_penalty else 0)
        best = dict(zip(map(id, beams), largest_logprobs(logits_NV, peaks(logits_NV)[1], wanted)))
        children: list[list[_Child]] = []
        for group in self._groups:
            penalties = {token: np.float32(params.diversity_penalty * count) for token, count in taken.items()}
            children.append(group.advance([(beam, best[id(beam)]) for beam in group.running], penalties))
            taken.update(group.taken)
        self._branch(beams, children)

    def _branch(self, beams: list[_Running], children: list[list[_Child]]) -> None:
        """Give each child a sequence: the first of a parent takes the parent's own, the others forks of it."""
        heirs = Counter(id(child.parent) for group in children for child in group)
        for group, chosen in zip(self._groups, children):
            group.running = []
            for child in chosen:
                heirs[id(child.parent)] -= 1
                handle = self._space.fork(child.parent.handle) if heirs[id(child.parent)] else child.parent.handle
                group.running.append(_Running(handle, [*child.parent.tokens, child.token], child.logprob))
        parents = {id(child.parent) for group in children for child in group}
        for beam in beams:
            if id(beam) not in parents:
                self._space.free(beam.handle)

    def best(self) -> list[Beam]:
        found = [beam for group in self._groups for beam in group.finished]
        return sorted(found, key=lambda beam: -beam.score)[: self._params.num_return]

    def close(self) -> None:
        for beam in self.running:
            self._space.free(beam.handle)
        for group in self._groups:
            group.running = []


@dataclass(eq=False)
class _Child:
    """A running beam with one more token."""

    parent: _Running
    token: int
    logprob: np.float32
    ranked_by: np.float32


class _Group:
    """Beams that compete with one another only. Sums are float32, as the model's scores are."""

    def __init__(self, width: int, params: BeamParams, eos_ids: frozenset[int], max_tokens: int):
        self.width, self.eos_ids = width, eos_ids
        self._params, self._max_tokens = params, max_tokens
        self.running: list[_Running] = []
        self.finished: list[Beam] = []
        self.taken: list[int] = []
        """tokens that its running beams took at the last place"""

    def advance(self, best: list[tuple[_Running, list[tuple[int, float]]]], penalties: dict[int, np.float32]) -> list[_Child]:
        """Extend the running beams by their best tokens; keep those that end and return those that go on, [] when the search is over."""
        self.taken = []
        if not best:
            return []
        children = [
            _Child(beam, token, total := beam.logprob + np.float32(logprob), total - penalties.get(token, np.float32(0.0)))
            for beam, tokens in best
            for token, logprob in tokens
        ]
        children.sort(key=lambda child: -child.ranked_by)  # stable: the earlier beam and the lower id first among equals
        length = len(best[0][0].tokens) + 1
        at_limit = length >= self._max_tokens
        ended = [child for child in children[: self.width] if at_limit or child.token in self.eos_ids]
        going = [child for child in children if child.token not in self.eos_ids][: self.width]
        self.taken = [child.token for child in going]
        self._keep(ended, length)
        return going if going and not at_limit and self._may_improve(max(child.logprob for child in going), length) else []

    def _keep(self, ended: list[_Child], length: int) -> None:
        if self._is_full and self._params.early_stopping is True:
            return
        for child in ended:
            is_end = child.token in self.eos_ids
            tokens = child.parent.tokens if is_end else [*child.parent.tokens, child.token]
            score = float(child.logprob / np.float32(length**self._params.length_penalty))
            self.finished.append(Beam(tokens, score, float(child.logprob), "stop" if is_end else "length"))
        self.finished.sort(key=lambda beam: -beam.score)
        del self.finished[self.width :]

    @property
    def _is_full(self) -> bool:
        return len(self.finished) == self.width

    def _may_improve(self, best_running: np.float32, length: int) -> bool:
        """Return whether the search goes on; the estimates are transformers', which may err where long answers score higher."""
        if not self._is_full:
            return True
        if self._params.early_stopping is True:
            return False
        if self._params.early_stopping == "never" and self._params.length_penalty > 0:
            length = self._max_tokens
        return float(best_running / np.float32(length**self._params.length_penalty)) > self.finished[-1].score
