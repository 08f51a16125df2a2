"""What a request that decodes does next: the tokens that its constraint forces, or those that a drafter guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plinth.inference.request import Request

MAX_DRAFT_TOKENS = 15  # with the last token one tile of 16 rows


@dataclass(eq=False, slots=True)
class Turn:
    """What one request does in a step that gives it tokens."""

    request: Request
    planned: Sequence[int] = ()
    """tokens that are forced or guessed to follow the last token"""
    num_forced: int = 0
    """how many of them are forced"""
    is_closed: bool = False
    """whether the planned tokens are all there is to come in this step"""
    masks: Sequence[np.ndarray | None] = (None,)
    """for each row the tokens that may be drawn, as Constraint.allowed gives them"""
    source: int = 0
    """its first row among the logits"""
    runs: bool = True
    """whether it runs rows of its own; a request whose prompt has just ended takes the logits of its last row"""

    @property
    def num_choices(self) -> int:
        return len(self.planned) + (not self.is_closed)

    def row_tokens(self) -> list[int]:
        """Return the tokens that it runs."""
        return [self.request.tokens[-1], *self.planned[: self.num_choices - 1]]


def plan_turn(request: Request, vocab_size: int) -> Turn:
    """Return what a request that decodes does next; forced tokens are told to its constraint here."""
    if request.constraint is None and request.drafter is None:
        return Turn(request)
    room = request.max_tokens - request.num_generated
    if request.constraint is not None:
        forced = _until_stop(request.constraint.forced(), request)[:room]
        if forced:
            return _forced_turn(request, forced, room, vocab_size)
    return _drafted_turn(request, _draft(request, min(room - 1, MAX_DRAFT_TOKENS), vocab_size))


def _draft(request: Request, room: int, vocab_size: int) -> list[int]:
    """Return the drafter's guess as far as there is room for it and it names tokens that exist."""
    if request.drafter is None or room < 1:
        return []
    guess = request.drafter.propose(request.tokens, room)[:room]
    wrong = next((i for i, token in enumerate(guess) if not 0 <= token < vocab_size), len(guess))
    return guess[:wrong]


def _until_stop(tokens: Sequence[int], request: Request) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in request.stop_ids), len(tokens))
    return list(tokens[:stop])


def _forced_turn(request: Request, forced: list[int], room: int, vocab_size: int) -> Turn:
    constraint = request.constraint
    for token in forced:
        constraint.advance(token)
    is_closed = len(forced) == room or constraint.finished()
    masks: list[np.ndarray | None] = [only(token, vocab_size) for token in forced]
    return Turn(request, forced, len(forced), is_closed, masks if is_closed else [*masks, constraint.allowed()])


def _drafted_turn(request: Request, draft: list[int]) -> Turn:
    if request.constraint is None:
        return Turn(request, draft, masks=[None] * (len(draft) + 1))
    if not draft:
        return Turn(request, masks=[request.constraint.allowed()])
    ahead, masks = request.constraint.copy(), []
    for i, token in enumerate(draft):
        mask = ahead.allowed()
        masks.append(None if mask is None else mask.copy())
        if token in request.stop_ids or not allows(masks[-1], token):
            return Turn(request, draft[:i], masks=masks)
        ahead.advance(token)
    return Turn(request, draft, masks=[*masks, None if ahead.finished() else ahead.allowed()])


def only(token: int, vocab_size: int) -> np.ndarray:
    """Return the mask that allows one token."""
    mask = np.zeros(-(-vocab_size // 8), np.uint8)
    mask[token // 8] = 1 << token % 8
    return mask


def allows(mask: np.ndarray | None, token: int) -> bool:
    """Return whether a mask allows a token."""
    return mask is None or bool(mask[token // 8] >> token % 8 & 1)
