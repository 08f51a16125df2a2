"""The family of losses of sampled completions: what each does, said without PyTorch; policy_losses computes them."""

from __future__ import annotations

from dataclasses import dataclass

from plinth.config import UserError

SURROGATES = ("clipped", "soft", "weighted", "gamma")
LEVELS = ("token", "sequence_mean", "sequence_token", "sequence_sum")
AGGREGATIONS = ("sequence_mean", "sequence_sum", "token", "fixed_length")
MISMATCHES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class PolicyLoss:
    """What a member of the family does with the ratio of policy to sampler, and how it averages over tokens."""

    surrogate: str = "clipped"
    """clipped (PPO), soft (SAPO's gate), or a detached weight times the log-probability: weighted (CISPO) or gamma (VESPO)"""
    level: str = "token"
    """whose ratio: each token's, the sequence's geometric mean (GSPO), that with each token's gradient its own (GSPO-token), or the whole
    sequence's (RLOO)"""
    aggregation: str = "token"
    """mean over sequences of token means, of token sums, over all tokens, or sum over sequences × max_tokens"""
    epsilon_low: float = 0.2
    """the ratio is clipped below one minus this"""
    epsilon_high: float = 0.2
    """the ratio is clipped above one plus this"""
    ratio_cap: float | None = None
    """upper bound of the ratio in the unclipped term too, against negative advantages of huge ratio; TRL's delta"""
    dual_clip: float | None = None
    """bound c > 1 of the loss of a negative advantage, −c·A (verl: 3)"""
    weight_cap: float = 5.0
    """largest weight of the weighted surrogate"""
    temperature_positive: float = 1.0
    """steepness of the soft gate where the advantage is positive"""
    temperature_negative: float = 1.05
    """the same where it is not"""
    gamma_positive: tuple[float, float] = (2.0, 3.0)
    """k and λ of the gamma weight w^k e^(λ(1−w)) of the sequence's ratio w, where the advantage is not negative"""
    gamma_negative: tuple[float, float] = (3.0, 2.0)
    """the same where it is negative"""
    off_policy_threshold: float | None = None
    """completions of negative advantage count nothing where log π_sampler − log π is above this on average, in nats a token"""
    mismatch: str | None = None
    """weights for the difference between engine and trainer, one of MISMATCHES, see `mismatch_weights`"""
    mismatch_cap: float = 3.0
    """upper bound of such a weight"""
    mismatch_floor: float | None = None
    """lower bound of such a weight"""
    kl_coef: float = 0.0
    """weight of the KL to the reference inside the loss"""
    kl_estimator: str = "k3"
    """k1, k2 or k3, see `kl_estimate`"""
    kl_weighted: bool = False
    """multiply the KL by the ratio, without which the gradient of k3 is not that of the KL"""
    max_tokens: int | None = None
    """length that aggregation fixed_length divides by, tokens"""

    def __post_init__(self) -> None:
        for name, known in (("surrogate", SURROGATES), ("level", LEVELS), ("aggregation", AGGREGATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}.")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip={self.dual_clip} must be above 1, as 3, or None for no bound.")
        if self.surrogate == "weighted" and self.level != "token":
            raise UserError(f"surrogate=weighted weights tokens, and level={self.level!r} has none. Use level=token.")
        if self.surrogate == "gamma" and self.level != "sequence_sum":
            raise UserError(f"surrogate=gamma weighs whole sequences, and level={self.level!r} is another ratio. Use level=sequence_sum.")
        if self.mismatch is not None and self.mismatch not in MISMATCHES:
            raise UserError(f"mismatch={self.mismatch!r} is none of {', '.join(MISMATCHES)}.")
        if not (self.mismatch_floor or 0) < self.mismatch_cap or self.mismatch_cap < 1 or (self.mismatch_floor or 0) > 1:
            raise UserError(f"mismatch_floor={self.mismatch_floor} and mismatch_cap={self.mismatch_cap} must lie on both sides of 1.")
        for name in ("ratio_cap", "weight_cap", "temperature_positive", "temperature_negative"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("gamma_positive", "gamma_negative"):
            if min(getattr(self, name)) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: both numbers must be positive.")


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss(),  # Schulman et al. 2017, arXiv:1707.06347, eq. 7
    "grpo": PolicyLoss(aggregation="sequence_mean"),  # Shao et al. 2024, arXiv:2402.03300
    "dr_grpo": PolicyLoss(aggregation="fixed_length"),  # Liu et al. 2025, arXiv:2503.20783
    "dapo": PolicyLoss(epsilon_high=0.28),  # Yu et al. 2025, arXiv:2503.14476
    "gspo": PolicyLoss(level="sequence_mean", aggregation="sequence_mean", epsilon_low=3e-4, epsilon_high=4e-4),  # arXiv:2507.18071
    "gspo_token": PolicyLoss(level="sequence_token", aggregation="sequence_mean", epsilon_low=3e-4, epsilon_high=4e-4),  # there, eq. 13
    "cispo": PolicyLoss(surrogate="weighted"),  # MiniMax 2025, arXiv:2506.13585
    "sapo": PolicyLoss(surrogate="soft", aggregation="sequence_mean"),  # Gao et al. 2025, arXiv:2511.20347
    "vespo": PolicyLoss(surrogate="gamma", level="sequence_sum"),  # Shen et al. 2026, arXiv:2602.10693
    "luspo": PolicyLoss(level="sequence_mean", aggregation="sequence_sum"),  # length-unbiased GSPO
    "rloo": PolicyLoss(level="sequence_sum", aggregation="sequence_mean"),  # Ahmadian et al. 2024, arXiv:2402.14740, clipped as in TRL
    "remax": PolicyLoss(aggregation="sequence_sum"),  # Li et al. 2023, arXiv:2310.10505: REINFORCE; its advantages differ
    "reinforce_pp": PolicyLoss(),  # Hu 2025, arXiv:2501.03262: the surrogate of PPO; its advantages differ
}
