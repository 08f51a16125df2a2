"""Losses of sampled completions under advantages: PPO's clipped surrogate and value loss, and the GRPO family as one table of settings.

Every function takes per-token log-probabilities in nats of shape (B, T) and a mask of the counted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plinth.config import UserError
from plinth.posttraining.advantage import kl_estimate
from plinth.posttraining.policy_config import PolicyLoss

LARGEST_RATIO = 1e6  # beyond it a gamma weight is 0 in every dtype


@dataclass(frozen=True)
class PolicyBatch:
    """What the loss of sampled completions reads."""

    log_probs_BT: Tensor
    """the policy's, of the sampled tokens"""
    sampler_BT: Tensor
    """the log-probabilities at the time of sampling, without gradient"""
    advantages_BT: Tensor
    """advantages, shape (B, T), or (B, 1) for one a completion"""
    mask_BT: Tensor
    """1 where a token counts"""
    reference_BT: Tensor | None = None
    """the reference's log-probabilities, needed for a KL inside the loss"""
    engine_BT: Tensor | None = None
    """the engine's own log-probabilities as it sampled, where they are not those of sampler_BT, the trainer's at that time"""


def importance_ratio(log_probs_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor, level: str = "token") -> Tensor:
    """Return π/π_sampler: of each token (B, T), or of a sequence (B, 1) as its geometric mean over tokens or as its product.

    With level sequence_token it is (B, T): the value of the geometric mean, the gradient of the token's own log-probability.
    """
    log_ratio_BT = (log_probs_BT - sampler_BT) * mask_BT
    if level == "token":
        return torch.exp(log_ratio_BT)
    total_B1 = log_ratio_BT.sum(1, keepdim=True)
    if level == "sequence_sum":
        return torch.exp(total_B1)
    mean_B1 = torch.exp(total_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1))
    return mean_B1 if level == "sequence_mean" else mean_B1.detach() * torch.exp(log_probs_BT - log_probs_BT.detach())


def clipped_surrogate(ratio: Tensor, advantages: Tensor, settings: PolicyLoss) -> Tensor:
    """Return −min(ρA, clip(ρ, 1−ε_low, 1+ε_high)A), at most −cA for a negative A under a dual clip.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; the dual clip of Ye et al. 2019, arXiv:1912.09729.
    """
    free = ratio if settings.ratio_cap is None else ratio.clamp(max=settings.ratio_cap)
    loss = -torch.minimum(free * advantages, ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high) * advantages)
    if settings.dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -settings.dual_clip * advantages), loss)


def soft_surrogate(ratio: Tensor, advantages: Tensor, settings: PolicyLoss) -> Tensor:
    """Return −(4/τ) σ(τ(ρ − 1)) A, whose slope at ρ = 1 is that of −ρA.  Source: Gao et al. 2025 (SAPO), arXiv:2511.20347."""
    hot, cold = (torch.full_like(advantages, value) for value in (settings.temperature_positive, settings.temperature_negative))
    tau = torch.where(advantages > 0, hot, cold)  # a number in torch.where would be rounded to fp32
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def weighted_surrogate(ratio_BT: Tensor, advantages: Tensor, log_probs_BT: Tensor, settings: PolicyLoss) -> Tensor:
    """Return −min(ρ, cap) A log π with the weight detached, so that every token keeps a gradient.

    Source: MiniMax 2025 (CISPO), arXiv:2506.13585.  Differs: no lower bound of the weight, which the paper leaves off too.
    """
    return -ratio_BT.detach().clamp(max=settings.weight_cap) * advantages * log_probs_BT


def gamma_surrogate(ratio_B1: Tensor, advantages: Tensor, log_probs_BT: Tensor, settings: PolicyLoss) -> Tensor:
    """Return −φ(w) A log π, φ(w) = w^k e^(λ(1−w)) of the whole sequence's ratio w, detached; φ(1) = 1.

    k and λ are those of the advantage's sign: k/λ is the ratio that weighs most.
    Source: Shen et al. 2026 (VESPO), arXiv:2602.10693.  Differs: log w is not bounded below, where φ is 0 anyway.
    """
    ratio_B1 = ratio_B1.detach().clamp(max=LARGEST_RATIO)
    k, rate = (
        torch.where(advantages >= 0, torch.full_like(advantages, up), torch.full_like(advantages, down))
        for up, down in zip(settings.gamma_positive, settings.gamma_negative)
    )
    return -torch.exp(k * ratio_B1.log() + rate * (1 - ratio_B1)) * advantages * log_probs_BT


def off_policy_keep(log_probs_BT: Tensor, sampled_BT: Tensor, advantages: Tensor, mask_BT: Tensor, threshold: float) -> Tensor:
    """Return 0 for what has a negative advantage in a completion whose mean log π_sampled − log π is above the threshold, else 1.

    The mean, in nats a token, estimates KL(sampler ‖ policy). What is dropped still counts in the average.
    Source: DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv:2512.02556, eq. 9.
    """
    drift_B1 = ((sampled_BT - log_probs_BT.detach()) * mask_BT).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return ((advantages >= 0) | (drift_B1 <= threshold)).to(mask_BT.dtype)


def mismatch_weights(
    trainer_BT: Tensor, engine_BT: Tensor, mask_BT: Tensor, *, mode: str = "token_truncate", cap: float = 3.0, floor: float | None = None
) -> Tensor:
    """Return detached weights π_trainer/π_engine at the time of sampling, of tokens (B, T) or of sequences (B, 1), kept in [floor, cap].

    A truncated weight beyond a bound becomes the bound, a masked one 0. Multiply the policy's loss by it.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncate); with a floor, masked
    tokens are those of IcePop (Ring-1T), arXiv:2510.18855.
    """
    level = "token" if mode.startswith("token") else "sequence_sum"
    ratio = importance_ratio(trainer_BT, engine_BT, mask_BT.to(trainer_BT.dtype), level).detach()
    if mode.endswith("truncate"):
        return ratio.clamp(min=floor, max=cap)
    return torch.where((ratio <= cap) & (ratio >= (floor or 0.0)), ratio, 0.0)


def aggregate(loss_BT: Tensor, mask_BT: Tensor, how: str, max_tokens: int | None = None) -> tuple[Tensor, int]:
    """Return (sum, count) whose quotient over all micro-batches is the average called `how`, one of AGGREGATIONS.

    A sequence without counted tokens adds nothing and, in the means over sequences, is not counted.
    """
    tokens_B = mask_BT.sum(1)
    sums_B = (loss_BT * mask_BT).sum(1)
    if how == "token":
        return sums_B.sum(), int(tokens_B.sum())
    if how == "fixed_length":
        if max_tokens is None or max_tokens <= 0:
            raise UserError(f"max_tokens={max_tokens}, but aggregation=fixed_length divides by it. Give the longest completion in tokens.")
        return sums_B.sum(), len(tokens_B) * max_tokens
    count = int((tokens_B > 0).sum())
    return (sums_B / tokens_B.clamp(min=1) if how == "sequence_mean" else sums_B).sum(), count


def policy_loss(batch: PolicyBatch, settings: PolicyLoss) -> tuple[Tensor, int, dict[str, float]]:
    """Return (loss_sum, count, metrics) of one member of the family; metrics are summed with the weights of the loss.

    clip_fraction is the share of tokens whose gradient the clip stops, kl_sampler the k1 estimate of KL(sampler ‖ policy) in nats,
    kl_token that to the reference, by the estimator of the loss, off_policy_dropped the share that the threshold drops, mismatch_weight
    the mean weight. Raises ValueError when a KL is asked for without a reference, or weights without the engine's log-probabilities.
    """
    mask_BT = batch.mask_BT.to(batch.log_probs_BT.dtype)
    ratio = importance_ratio(batch.log_probs_BT, batch.sampler_BT, mask_BT, settings.level)
    loss, measured = _weighed_surrogate(batch, ratio, mask_BT, settings)
    loss_BT = loss.expand_as(mask_BT)
    if settings.kl_coef:
        if batch.reference_BT is None:
            raise ValueError(f"kl_coef={settings.kl_coef} needs reference_BT. Give it, or set kl_coef=0.")
        kl_BT = kl_estimate(batch.log_probs_BT, batch.reference_BT, settings.kl_estimator)
        if settings.kl_weighted:
            kl_BT = kl_BT * (importance_ratio(batch.log_probs_BT, batch.sampler_BT, mask_BT) if settings.surrogate == "gamma" else ratio)
        loss_BT = loss_BT + settings.kl_coef * kl_BT
        measured["kl_token"] = kl_BT
    how = "sequence_mean" if settings.aggregation == "sequence_sum" else settings.aggregation  # so that a share stays one
    with torch.no_grad():
        measured["kl_sampler"] = batch.sampler_BT - batch.log_probs_BT
        measured["clip_fraction"] = _stopped(ratio, batch.advantages_BT, settings)
        metrics = {
            name: float(aggregate(value.detach().expand_as(mask_BT).to(mask_BT.dtype), mask_BT, how, settings.max_tokens)[0])
            for name, value in measured.items()
        }
    return *aggregate(loss_BT, mask_BT, settings.aggregation, settings.max_tokens), metrics


def _weighed_surrogate(batch: PolicyBatch, ratio: Tensor, mask_BT: Tensor, settings: PolicyLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the policy's part of the loss, (B, T) or (B, 1), with what weighs or drops it, and what was measured of that."""
    advantages, weights, measured = batch.advantages_BT, None, {}
    if settings.mismatch is not None:
        if batch.engine_BT is None:
            raise ValueError(f"mismatch={settings.mismatch} needs engine_BT. Give it, or set mismatch=None.")
        limits = {"cap": settings.mismatch_cap, "floor": settings.mismatch_floor}
        weights = mismatch_weights(batch.sampler_BT, batch.engine_BT, mask_BT, mode=settings.mismatch, **limits)
        measured["mismatch_weight"] = weights
    if settings.surrogate == "gamma":  # whose weight is of the whole ratio, engine and trainer among it
        if weights is not None:
            ratio = ratio * torch.where(mask_BT != 0, weights, 1.0).prod(1, keepdim=True) if weights.shape[1] > 1 else ratio * weights
        loss = gamma_surrogate(ratio, advantages, batch.log_probs_BT, settings)
    elif settings.surrogate == "weighted":
        loss = weighted_surrogate(ratio, advantages, batch.log_probs_BT, settings)
    else:
        loss = (clipped_surrogate if settings.surrogate == "clipped" else soft_surrogate)(ratio, advantages, settings)
    if settings.off_policy_threshold is not None:
        sampled_BT = batch.sampler_BT if batch.engine_BT is None else batch.engine_BT
        keep = off_policy_keep(batch.log_probs_BT, sampled_BT, advantages, mask_BT, settings.off_policy_threshold)
        loss, measured["off_policy_dropped"] = loss * keep, 1 - keep
    return loss if weights is None or settings.surrogate == "gamma" else loss * weights, measured


def _stopped(ratio: Tensor, advantages: Tensor, settings: PolicyLoss) -> Tensor:
    if settings.surrogate in ("soft", "gamma"):
        return torch.zeros_like(ratio)
    if settings.surrogate == "weighted":
        return ratio > settings.weight_cap
    return ((ratio > 1 + settings.epsilon_high) & (advantages > 0)) | ((ratio < 1 - settings.epsilon_low) & (advantages < 0))


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, int, dict[str, float]]:
    """Return (Σ ½ max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²), tokens, metrics) over counted tokens.

    With clip None it is the plain square; the metric is the number of tokens where the clipped square is the larger.

    Source: the PPO code of OpenAI baselines; the paper has no clip.
    """
    counted_BT = mask_BT != 0
    squares_BT = (values_BT - returns_BT) ** 2
    metrics = {}
    if clip is not None:
        near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        other_BT = (near_BT - returns_BT) ** 2
        metrics["value_clip_fraction"] = float(((other_BT > squares_BT) & counted_BT).sum())
        squares_BT = torch.maximum(squares_BT, other_BT)
    return 0.5 * (squares_BT * counted_BT).sum(), int(counted_BT.sum()), metrics
