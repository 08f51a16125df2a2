"""From sampled and scored completions to what PPO learns from: rewards a token, advantages, returns. Pure functions of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from plinth.posttraining.advantage import adapted_kl_coef, gae, kl_estimate, token_rewards, whiten
from plinth.posttraining.ppo_config import EndConfig, KlConfig, PpoConfig, RewardShape
from plinth.posttraining.rollouts import Rollouts, Rows, take_rows
from plinth.tokenizer.encode import Tokenizer


@dataclass
class RewardState:
    """What of the reward changes from roll-out to roll-out; saved and restored with the run."""

    kl_coef: float
    """coefficient of the KL penalty"""
    gain: float = 1.0
    """factor on scores"""
    shift: float = 0.0
    """added to scores after it"""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def normalise(self, scores: Sequence[float]) -> None:
        """Choose gain and shift so that these scores get mean 0 and deviation 1; equal scores are only shifted."""
        values = torch.tensor(scores, dtype=torch.float64)
        deviation = float(values.std()) if len(scores) > 1 else 0.0
        self.gain = 1.0 / deviation if deviation > 0 else 1.0
        self.shift = -self.gain * float(values.mean())

    def adapt(self, kl_nats: float, completions: int, config: KlConfig) -> None:
        """Move the coefficient towards the target, where there is one, after a roll-out."""
        if config.target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, kl_nats, target_nats=config.target, horizon=config.horizon, completions=completions
            )


def end_completions(rollouts: Rollouts, config: EndConfig, tokenizer: Tokenizer, end_ids: Sequence[int]) -> tuple[Rollouts, list[str]]:
    """Return the roll-outs with completions ended as EndConfig says, and their texts.

    With fixed_length the tokens behind an end token stay (they are trained on, as in OpenAI's code), and only the text ends there.
    """
    if config.fixed_length:
        ends = [next((i for i, token in enumerate(tokens) if token in end_ids), None) for tokens in rollouts.completions]
        texts = [tokenizer.decode(tokens[:end]) for tokens, end in zip(rollouts.completions, ends)]
        rollouts = replace(rollouts, finished=[end is not None for end in ends])
    else:
        texts = [tokenizer.decode(rollouts.answer_tokens(i)) for i in range(len(rollouts))]
    if config.truncate_at is None:
        return rollouts, texts
    completions, log_probs, finished = list(rollouts.completions), list(rollouts.log_probs), list(rollouts.finished)
    for i, tokens in enumerate(completions):
        cut = _cut(tokens, config, tokenizer)
        finished[i] = cut is not None
        if cut is not None:
            completions[i], log_probs[i] = tokens[:cut], log_probs[i][:cut]
            texts[i] = tokenizer.decode([token for token in completions[i] if token not in end_ids])
    return replace(rollouts, completions=completions, log_probs=log_probs, finished=finished), texts


def _cut(tokens: Sequence[int], config: EndConfig, tokenizer: Tokenizer) -> int | None:
    """Return how many tokens stand up to the end that is looked for; None where there is no such end."""
    assert config.truncate_at is not None
    for place in range(config.truncate_from, len(tokens)):
        if config.truncate_at in tokenizer.decode([tokens[place]]):
            return place + 1
    return None


def shape_scores(scores: Sequence[float], finished: Sequence[bool], state: RewardState, shape: RewardShape, end: EndConfig) -> torch.Tensor:
    """Return scores normalised and clipped, and those of completions that did not end as EndConfig has them, fp32 (N,)."""
    values = torch.tensor(scores, dtype=torch.float32) * state.gain + state.shift
    if shape.clip is not None:
        values = values.clamp(-shape.clip, shape.clip)
    ended = torch.tensor(finished)
    if end.missing_score is not None:
        values = torch.where(ended, values, end.missing_score)
    return values - end.missing_penalty * ~ended


def advantages(rows: Rows, config: PpoConfig) -> Rows:
    """Return {"advantages", "returns"}, both (N, C), of rows as a roll-out or an update has them.

    Rows hold log_probs, reference, values and mask (N, C), scores, end_values and kl_coef (N,).
    Source: Ziegler et al. 2019, arXiv:1909.08593, for the rewards; Schulman et al. 2015, arXiv:1506.02438, for the advantages.
    """
    mask, scores, coef = rows["mask"], rows["scores"], rows["kl_coef"]
    kl = coef[:, None] * kl_estimate(rows["log_probs"], rows["reference"], config.kl.estimator) * mask
    if not config.kl.per_token:
        scores, kl = scores - kl.sum(1), torch.zeros_like(kl)
    values, counted = rows["values"], mask
    if config.reward.place == "past_end":  # one more place in each row that ended, in which its score stands
        kl, values, mask = F.pad(kl, (0, 1)), F.pad(values, (0, 1)), F.pad(mask, (0, 1))
        counted = mask | (F.pad(rows["mask"], (1, 0)) & rows["finished"][:, None])
        values = values + (counted & ~mask) * rows["end_values"][:, None]
    rewards = token_rewards(kl, scores, counted, kl_coef=1.0)
    how = config.advantage
    if config.reward.whiten:
        rewards = whiten(rewards, counted, shift_mean=False, unbiased=how.unbiased)
    found, returns = gae(rewards, values * counted, gamma=how.gamma, lam=how.lam)
    width = rows["mask"].shape[1]
    found, returns = found[:, :width] * rows["mask"], returns[:, :width] * rows["mask"]
    if how.whiten:
        found = whiten(found, rows["mask"], unbiased=how.unbiased)
    return {"advantages": found, "returns": returns}


def joint_advantages(parts: Sequence[Rows], config: PpoConfig) -> list[Rows]:
    """Return the micro-batches of one update with advantages taken over all of them together."""
    whole = concat(parts)
    whole |= advantages(whole, config)
    return [take_rows(whole, index) for index in torch.arange(len(whole["mask"])).split([len(part["mask"]) for part in parts])]


def concat(parts: Sequence[Rows]) -> Rows:
    """Return micro-batches as one, each tensor padded to the widest."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].dim() > 1:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def measures(rows: Rows) -> dict[str, float]:
    """Return the metrics of a roll-out: KL to the reference in nats a completion, entropy left out, tokens, share that ended, and how
    much of the returns' variance the critic explained."""
    mask = rows["mask"]
    kl_BT = kl_estimate(rows["log_probs"], rows["reference"]) * mask
    returns, values = rows["returns"][mask], rows["values"][mask]
    spread = float(returns.var()) if len(returns) > 1 else 0.0
    return {
        "score": float(rows["scores"].mean()),
        "kl": float(kl_BT.sum(1).mean()),
        "kl_coef": float(rows["kl_coef"][0]),
        "objective": float((rows["scores"] - rows["kl_coef"] * kl_BT.sum(1)).mean()),
        "completion_tokens": float(mask.sum(1).float().mean()),
        "finished": float(rows["finished"].float().mean()),
        "value": float(values.mean()),
        "explained_variance": 1.0 - float((returns - values).var()) / spread if spread else 0.0,
    }
