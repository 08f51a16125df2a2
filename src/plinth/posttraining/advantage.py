"""Advantages of sampled completions: rewards a token, generalised advantage estimation, whitening, baselines of a group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plinth.config import UserError

GROUP_EPSILON = 1e-4


def kl_estimate(log_probs_BT: Tensor, reference_BT: Tensor, kind: str = "k1") -> Tensor:
    """Return an estimate in nats, a token, of KL(policy ‖ reference) at tokens that the policy sampled, shape (B, T).

    With x = log π_ref − log π: k1 = −x (unbiased), k2 = x²/2 (biased, its gradient in a loss is the right one), k3 = eˣ − 1 − x (unbiased,
    never negative; its gradient in a loss is not that of the KL).
    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio_BT = reference_BT - log_probs_BT
    if kind == "k1":
        return -log_ratio_BT
    if kind == "k2":
        return 0.5 * log_ratio_BT**2
    if kind == "k3":
        return torch.expm1(log_ratio_BT) - log_ratio_BT
    raise UserError(f"kind={kind!r} is none of k1, k2, k3.")


def token_rewards(kl_BT: Tensor, scores_B: Tensor, mask_BT: Tensor, *, kl_coef: float, past_end: bool = False) -> Tensor:
    """Return −kl_coef × KL at counted tokens plus each completion's score at its last counted token, shape (B, T).

    With `past_end` the score stands one position later, where there is one: TRL's way, which discounts it by λ on its way back.
    Raises ValueError when a row counts no token.
    Source: Ziegler et al. 2019, arXiv:1909.08593.
    """
    counted_BT = mask_BT != 0
    if not bool(counted_BT.any(1).all()):
        raise ValueError("a completion without counted tokens has no place for its score. Leave it out.")
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(counted_BT, places_T, -1).amax(1)
    if past_end:
        last_B = (last_B + 1).clamp(max=mask_BT.shape[1] - 1)
    rewards_BT = -kl_coef * kl_BT * counted_BT
    return rewards_BT + (places_T == last_B[:, None]) * scores_B[:, None]


def gae(rewards_BT: Tensor, values_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), both (B, T): A_t = δ_t + γλA_{t+1}, δ_t = r_t + γV_{t+1} − V_t, returns A + V.

    After the last column the value is 0; rewards and values behind the end of a completion must be 0.
    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    deltas_BT = rewards_BT - values_BT
    deltas_BT[:, :-1] += gamma * values_BT[:, 1:]
    columns, running_B = [], torch.zeros_like(deltas_BT[:, 0])
    for column_B in deltas_BT.flip(1).unbind(1):
        running_B = column_B + gamma * lam * running_B
        columns.append(running_B)
    advantages_BT = torch.stack(columns[::-1], 1)
    return advantages_BT, advantages_BT + values_BT


def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Return (x − mean) / √(var + epsilon) over counted values, 0 elsewhere; with `shift_mean` false the mean is added back.

    `unbiased` divides the squares by n − 1 (Bessel), as PyTorch's libraries do; TensorFlow's original divided by n. Raises ValueError
    for fewer than two counted values.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    count = int(counted.sum())
    if count < 2:
        raise ValueError(f"{count} counted values have no spread to divide by. Whiten over more completions.")
    mean = (values * counted).sum() / count
    variance = ((values - mean) ** 2 * counted).sum() / (count - 1 if unbiased else count)
    result = (values - mean) * torch.rsqrt(variance + epsilon)
    return (result if shift_mean else result + mean) * counted


def adapted_kl_coef(kl_coef: float, kl_nats: float, *, target_nats: float = 6.0, horizon: int = 10_000, completions: int) -> float:
    """Return β(1 + clip(KL/target − 1, ±0.2) × completions/horizon), the next coefficient of the KL penalty.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl_nats / target_nats - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


def _spread(rewards_PG: Tensor, mean_P1: Tensor, counted_PG: Tensor, unbiased: bool) -> Tensor:
    """The standard deviation of each row's counted values, 0 for a row with too few, shape (P, 1)."""
    count_P1 = counted_PG.sum(1, keepdim=True)
    squares_P1 = torch.where(counted_PG, (rewards_PG - mean_P1) ** 2, 0.0).sum(1, keepdim=True)
    return (squares_P1 / (count_P1 - int(unbiased)).clamp(min=1)).sqrt()


def group_advantages(rewards_PG: Tensor, *, scale: str = "group", unbiased: bool = True, epsilon: float = GROUP_EPSILON) -> Tensor:
    """Return rewards minus their prompt's mean, divided by a standard deviation + epsilon, shape (P, G); 0 where the reward is NaN.

    `scale` is "group" (a prompt's own; GRPO), "batch" (of all rewards) or "none" (Dr. GRPO). A NaN marks a completion that could not be
    scored; it counts in no mean.
    Source: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783.
    """
    counted_PG = ~rewards_PG.isnan()
    filled_PG = torch.where(counted_PG, rewards_PG, 0.0)
    mean_P1 = filled_PG.sum(1, keepdim=True) / counted_PG.sum(1, keepdim=True).clamp(min=1)
    centered_PG = torch.where(counted_PG, filled_PG - mean_P1, 0.0)
    if scale == "none":
        return centered_PG
    if scale == "group":
        return centered_PG / (_spread(filled_PG, mean_P1, counted_PG, unbiased) + epsilon)
    if scale == "batch":
        row, counted = filled_PG.reshape(1, -1), counted_PG.reshape(1, -1)
        mean = row.sum(1, keepdim=True) / counted.sum().clamp(min=1)
        return centered_PG / (_spread(row, mean, counted, unbiased) + epsilon)
    raise UserError(f"scale={scale!r} is none of group, batch, none.")


def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """Return each reward minus the mean of the prompt's other rewards, shape (P, G); 0 where the reward is NaN or no other is there.

    A NaN marks a completion that could not be scored; it counts in no mean.
    Source: Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.  Raises ValueError for groups of one.
    """
    size = rewards_PG.shape[1]
    if size < 2:
        raise ValueError(f"group_size={size} leaves no other completion for the baseline. Sample 2 or more a prompt.")
    counted_PG = ~rewards_PG.isnan()
    count_P1 = counted_PG.sum(1, keepdim=True)
    return group_advantages(rewards_PG, scale="none") * (count_P1 / (count_P1 - 1).clamp(min=1))


def greedy_baseline_advantages(rewards_PG: Tensor, greedy_P: Tensor) -> Tensor:
    """Return rewards minus that of the prompt's greedy completion, shape (P, G); kinds of reward may stand in front, (K, P, G).

    Source: Li et al. 2023 (ReMax), arXiv:2310.10505.
    """
    return rewards_PG - greedy_P[..., None]


def global_advantages(rewards_PG: Tensor, *, group_baseline: bool = False) -> Tensor:
    """Return rewards whitened over all completions, shape (P, G), after subtracting the prompt's mean if `group_baseline`.

    A NaN marks a completion that could not be scored; it counts nowhere, and gets 0.
    Source: Hu 2025 (REINFORCE++), arXiv:2501.03262.
    """
    plain_PG = group_advantages(rewards_PG, scale="none") if group_baseline else rewards_PG.nan_to_num(0.0)
    return _whitened_where(plain_PG, ~rewards_PG.isnan())


def _whitened_where(values: Tensor, counted: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Whiten over counted values; where all but one could not be scored, nothing has an advantage."""
    return torch.zeros_like(values) if int(counted.sum()) < 2 <= counted.numel() else whiten(values, counted, epsilon=epsilon)


def separate_reward_advantages(rewards_KPG: Tensor, weights_K: Tensor, *, epsilon: float = GROUP_EPSILON) -> Tensor:
    """Return K kinds of reward, each normalised within its group, summed by weight, then whitened over the batch, shape (P, G).

    A completion with a kind that could not be scored, NaN, counts nowhere in the whitening, and gets 0.
    Source: Liu et al. 2026 (GDPO), arXiv:2601.05242.
    """
    parts = [weight * group_advantages(rewards_PG, epsilon=epsilon) for rewards_PG, weight in zip(rewards_KPG, weights_K)]
    return _whitened_where(torch.stack(parts).sum(0), ~rewards_KPG.isnan().any(0), epsilon**2)


def informative_groups(rewards_PG: Tensor) -> Tensor:
    """Return which prompts have scored completions of different rewards, shape (P,), the only ones whose advantage is not all zero.

    Source: Yu et al. 2025 (DAPO, dynamic sampling), arXiv:2503.14476.
    """
    low_P = torch.where(rewards_PG.isnan(), math.inf, rewards_PG).amin(1)
    return torch.where(rewards_PG.isnan(), -math.inf, rewards_PG).amax(1) > low_P
