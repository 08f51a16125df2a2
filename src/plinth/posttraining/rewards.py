"""What completions are rewarded for: known rules by weight, functions of the caller, and controls that know no answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from plinth.posttraining.examples import Prompt
from plinth.posttraining.reward_sources import Rule, find_rule
from plinth.posttraining.rollout_config import RewardConfig
from plinth.posttraining.rollouts import Rollouts
from plinth.training.step import InlineWorker, Workers


def score_rollouts(
    config: RewardConfig,
    problems: Sequence[Prompt],
    rollouts: Rollouts,
    texts: Sequence[str],
    *,
    seed: Sequence[int],
    max_tokens: int,
    own: Mapping[str, Rule] | None = None,
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
            reward = own[name] if name in own else find_rule(name, config.verifier)
            judge = partial(_apply, reward, problem_of, texts)
            values.append([judge(i) for i in each] if workers is None else workers.map(judge, each))
    return torch.tensor(values, dtype=torch.float32)


def _apply(reward: Rule, problems: Sequence[Prompt], texts: Sequence[str], i: int) -> float:
    return float(reward(problems[i], texts[i]))


def overlong_punishment(lengths_N: torch.Tensor, max_tokens: int, margin_tokens: int) -> torch.Tensor:
    """Return 0 up to max_tokens − margin tokens, then (max_tokens − margin − length) / margin, down to −1 at max_tokens, shape (N,).

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.  Differs: max_tokens is the most that is sampled, so that nothing is longer.
    """
    return ((max_tokens - margin_tokens - lengths_N) / margin_tokens).clamp(-1.0, 0.0)
