"""What completions are rewarded for: the verifiers of the registry, functions of the caller, and controls that know no answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from plinth.config import UserError, nearest
from plinth.inference.verifiers import VERIFIERS, verify
from plinth.posttraining.examples import Verifiable
from plinth.posttraining.rollouts import Rollouts
from plinth.training.step import InlineWorker, Workers

Reward = Callable[[Verifiable, str], float]
"""(problem, text of the completion) -> reward; NaN where it cannot be told"""
CONTROLS = ("length", "random")
PATTERN = "format:"


@dataclass(frozen=True)
class RewardConfig:
    """Rewards of a completion and their weights."""

    rewards: tuple[str, ...] = ("verifier",)
    """verifier (the one that a row names), a verifier by name (exact, numeric, ...), format:PATTERN (a regular expression that the text
    must hold), and as controls length (share of max-tokens) and random (heads or tails)"""
    weights: tuple[float, ...] | None = None
    """weight of each (default: 1)"""
    verifier: str = "exact"
    """verifier of rows that name none"""

    def __post_init__(self) -> None:
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise UserError(f"rewards={self.rewards} must name at least one reward, each once.")
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise UserError(f"weights={self.weights} are {len(self.weights)} for {len(self.rewards)} rewards. Give one for each.")
        check(self.verifier, VERIFIERS, "verifier")

    @property
    def weights_K(self) -> torch.Tensor:
        """The weights as a tensor (K,)."""
        return torch.tensor(self.weights or (1.0,) * len(self.rewards))

    def check_names(self, own: Mapping[str, Reward], problems: Sequence[Verifiable]) -> None:
        """Raise UserError for a reward or a row's verifier that there is not."""
        for name in self.rewards:
            if not name.startswith(PATTERN):
                check(name, ("verifier", *own, *VERIFIERS, *CONTROLS), "reward")
        if "verifier" in self.rewards:
            for name in {problem.verifier for problem in problems if problem.verifier is not None}:
                check(name, VERIFIERS, "verifier")


def check(name: str, known: Sequence[str] | Mapping[str, object], field: str) -> None:
    """Raise UserError for a name that is not known."""
    if name not in known:
        raise UserError(f"{field}={name!r} is none of {', '.join(known)}.{nearest(name, known)}")


def score_rollouts(
    config: RewardConfig,
    problems: Sequence[Verifiable],
    rollouts: Rollouts,
    texts: Sequence[str],
    *,
    seed: Sequence[int],
    max_tokens: int,
    own: Mapping[str, Reward] | None = None,
    workers: Workers | InlineWorker | None = None,
) -> torch.Tensor:
    """Return each reward of each completion, float32 (K, N); NaN where one cannot be told.

    `problems` has one for each prompt of the roll-out. `seed` is that of the random control, and `own` are rewards by name.
    `workers` share the work: programs and queries take their time.
    """
    own, each = own or {}, range(len(rollouts))
    problem_of = [problems[i // rollouts.group_size] for i in each]
    values: list[list[float]] = []
    for name in config.rewards:
        if name == "random" and name not in own:
            values.append(np.random.Generator(np.random.PCG64(list(seed))).integers(0, 2, len(rollouts)).tolist())
        elif name == "length" and name not in own:
            values.append([len(rollouts.answer_tokens(i)) / max_tokens for i in each])
        else:
            reward = _reward(name, config, own)
            judge = partial(_apply, reward, problem_of, texts)
            values.append([judge(i) for i in each] if workers is None else workers.map(judge, each))
    return torch.tensor(values, dtype=torch.float32)


def _apply(reward: Reward, problems: Sequence[Verifiable], texts: Sequence[str], i: int) -> float:
    return float(reward(problems[i], texts[i]))


def _reward(name: str, config: RewardConfig, own: Mapping[str, Reward]) -> Reward:
    if name in own:
        return own[name]
    if name.startswith(PATTERN):
        pattern = name.removeprefix(PATTERN)
        return lambda problem, text: verify("regex", text, pattern)
    if name == "verifier":
        return lambda problem, text: verify(problem.verifier or config.verifier, text, problem.answer)
    return lambda problem, text: verify(name, text, problem.answer)


def overlong_punishment(lengths_N: torch.Tensor, max_tokens: int, margin_tokens: int) -> torch.Tensor:
    """Return 0 up to max_tokens − margin tokens, then (max_tokens − margin − length) / margin, down to −1 at max_tokens, shape (N,).

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.  Differs: max_tokens is the most that is sampled, so that nothing is longer.
    """
    return ((max_tokens - margin_tokens - lengths_N) / margin_tokens).clamp(-1.0, 0.0)
