"""What GRPO and its kin are made of: the members of the family, and the options that take the place of a member's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from plinth.config import UserError, check_least, check_positive, nearest
from plinth.posttraining.lora_config import LoraConfig, refuse_dropout
from plinth.posttraining.policy_config import POLICY_LOSSES, PolicyLoss
from plinth.posttraining.rollout_config import RewardConfig, SampleConfig
from plinth.training.config import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class Member:
    """What a member of the family adds to its loss (policy_losses.POLICY_LOSSES)."""

    advantages: str = "group"
    """group, none (the mean of the group taken off, no division), leave_one_out, greedy, global, global_baseline, or separate"""
    kl_in: Literal["loss", "reward"] = "loss"
    """where a KL goes"""
    kl_estimator: str = "k3"
    """its estimator"""
    resample_rounds: int = 0
    """further rounds of sampling for groups without spread"""


FAMILY: dict[str, Member] = {
    "grpo": Member(),
    "dr_grpo": Member("none"),
    "dapo": Member(resample_rounds=3),
    "gspo": Member(),
    "gspo_token": Member(),
    "cispo": Member(),
    "sapo": Member(),
    "vespo": Member(),
    "luspo": Member(),
    "rloo": Member("leave_one_out", "reward", "k1"),
    "remax": Member("greedy", "reward", "k1"),
    "reinforce_pp": Member("global", "reward", "k1"),
    "reinforce_pp_baseline": Member("global_baseline", "loss", "k2"),
}
ALIASES = {"reinforce++": "reinforce_pp", "reinforce++_baseline": "reinforce_pp_baseline", "reinforce++-baseline": "reinforce_pp_baseline"}
LOSS_OF = {"reinforce_pp_baseline": "reinforce_pp"}
READ_BY = {  # the options of the loss that only one surrogate reads
    "epsilon_low": "clipped", "epsilon_high": "clipped", "ratio_cap": "clipped", "dual_clip": "clipped", "weight_cap": "weighted",
    "temperature_positive": "soft", "temperature_negative": "soft", "gamma_positive": "gamma", "gamma_negative": "gamma",
}  # fmt: skip
READ_BY_ALL = ("off_policy_threshold", "mismatch", "mismatch_cap", "mismatch_floor")


@dataclass(frozen=True)
class GrpoConfig:
    """Loss, rewards, roll-outs and schedule of reinforcement learning without a critic."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=5, decay_fraction=0.2, keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(lr=3e-5, muon_lr=2e-4)
        )
    )
    """optimizer and schedule; not compiled on a GPU, as its batches have many shapes"""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """how completions are sampled"""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """what they are rewarded for"""
    loss: str = "grpo"
    """grpo, dr_grpo, dapo, gspo, gspo_token, cispo, sapo, vespo, luspo, rloo, remax, reinforce++ or reinforce++_baseline; docs/grpo.md"""
    advantages: Literal["group", "batch", "none", "leave_one_out", "greedy", "global", "global_baseline", "separate"] | None = None
    """baseline and scale of rewards; greedy compares with the most probable completion, which it lets the policy write; separate
    normalises each of several rewards by itself (default: the loss's own)"""
    epsilon_low: float | None = None
    """the ratio of policy to sampler is clipped below one minus this (default: the loss's own)"""
    epsilon_high: float | None = None
    """the ratio is clipped above one plus this; DAPO's clip-higher is 0.28 (default: the loss's own)"""
    ratio_cap: float | None = None
    """upper bound of the ratio where the advantage is negative, too, which the clip leaves without one; TRL's delta (default: none)"""
    dual_clip: float | None = None
    """bound above 1 of the loss of a negative advantage, in its sizes; 3 in verl (default: none)"""
    weight_cap: float | None = None
    """largest weight of cispo (default: 5)"""
    temperature_positive: float | None = None
    """steepness of sapo's gate where the advantage is positive (default: 1)"""
    temperature_negative: float | None = None
    """the same where it is not (default: 1.05)"""
    gamma_positive: tuple[float, float] | None = None
    """k and λ of vespo's weight where the advantage is not negative (default: 2 3)"""
    gamma_negative: tuple[float, float] | None = None
    """the same where it is negative (default: 3 2)"""
    off_policy_threshold: float | None = None
    """completions of negative advantage are dropped where the policy left their sampler by more than so many nats a token; off-policy
    sequence mask of DeepSeek-V3.2 (default: none are)"""
    mismatch: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = None
    """weigh tokens, or completions, by trainer over engine where the two do not give the same log-probabilities, as in bf16; a weight
    beyond the bounds becomes the bound (truncate) or 0 (mask) (default: no weights)"""
    mismatch_cap: float | None = None
    """upper bound of these weights (default: 3)"""
    mismatch_floor: float | None = None
    """lower bound of these weights (default: none); IcePop is token_mask between 0.5 and 5"""
    kl_coef: float = 0.0
    """weight of the KL to the model that training began with"""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """estimator of a KL within the loss (default: the loss's own, k3 for most)"""
    kl_in: Literal["loss", "reward"] | None = None
    """whether the KL is part of the loss or taken off the reward (default: the loss's own)"""
    kl_weighted: bool = False
    """multiply a k3 in the loss by the ratio of policy to sampler: the unbiased estimate of DeepSeek-V3.2, with the gradient of the KL"""
    prompts_per_rollout: int = 32
    """prompts that a roll-out asks"""
    rollouts: int = 100
    """roll-outs in all, where train.steps names no number of updates"""
    epochs: int = 1
    """passes over a roll-out"""
    minibatches: int = 1
    """updates a pass"""
    micro_batch_size: int = 32
    """completions a forward pass, whole groups"""
    resample_rounds: int | None = None
    """further rounds of sampling in place of groups whose rewards are all equal: dynamic sampling (default: the loss's own, DAPO's 3)"""
    keep_zero_spread: bool = False
    """let groups whose rewards are all equal count in the average; their advantage is 0, so they only make the update smaller"""
    overlong_margin_tokens: int | None = None
    """completions within so many tokens of sample.max-tokens lose up to 1 of their reward (default: none)"""
    mask_unfinished: bool = False
    """leave completions that were cut off out of the groups and out of the loss"""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """train adapters in place of the weights"""

    def __post_init__(self) -> None:
        if self.member_name not in FAMILY:
            raise UserError(f"loss={self.loss!r} is none of {', '.join(FAMILY)}.{nearest(self.loss, FAMILY)}")
        check_least(self, "prompts_per_rollout", "rollouts", "epochs", "minibatches", "micro_batch_size")
        check_least(self, "kl_coef", "epsilon_low", "epsilon_high", "mismatch_floor", "resample_rounds", least=0)
        check_least(self, "off_policy_threshold", least=-math.inf)
        check_positive(self, "ratio_cap", "weight_cap", "temperature_positive", "temperature_negative", "mismatch_cap")
        if self.sample.group_size < 2 and self.advantages_kind not in ("global", "greedy"):
            raise UserError(
                "sample.group_size=1 leaves no other completion to compare with. Sample 2 or more, or use advantages=greedy or global."
            )
        if self.overlong_margin_tokens is not None and not 0 < self.overlong_margin_tokens < self.sample.max_tokens:
            raise UserError(f"overlong_margin_tokens={self.overlong_margin_tokens} must lie between 1 and sample.max_tokens - 1.")
        refuse_dropout(self.adapter)
        self._check_read()
        self.settings  # noqa: B018 - its own checks

    def _check_read(self) -> None:
        """Raise UserError for an option that the loss would not read."""
        surrogate = POLICY_LOSSES[LOSS_OF.get(self.member_name, self.member_name)].surrogate
        for name, reader in READ_BY.items():
            if getattr(self, name) is not None and surrogate != reader:
                readers = ", ".join(loss for loss in FAMILY if POLICY_LOSSES[LOSS_OF.get(loss, loss)].surrogate == reader)
                raise UserError(f"{name}={getattr(self, name)} is not read by loss={self.loss}. Leave it out, or use one of {readers}.")
        for name in ("mismatch_cap", "mismatch_floor"):
            if getattr(self, name) is not None and self.mismatch is None:
                raise UserError(
                    f"{name}={getattr(self, name)} bounds the weights of mismatch, which is not given. Add mismatch=token_truncate."
                )
        if self.mismatch is not None and self.sample.temperature != 1:
            raise UserError(
                f"mismatch={self.mismatch} needs sample.temperature=1, not {self.sample.temperature}: the engine tells the "
                "log-probabilities of the model's own distribution, not of the one that it drew from. Leave mismatch out, or use 1."
            )
        if self.kl_weighted and not (self.kl_coef and self.member.kl_in == "loss" and self.member.kl_estimator == "k3"):
            raise UserError(
                f"kl_weighted is for a k3 within the loss; here kl_coef={self.kl_coef}, kl_in={self.member.kl_in}, "
                f"kl_estimator={self.member.kl_estimator}. Set them, or leave it out."
            )

    @property
    def member_name(self) -> str:
        return ALIASES.get(self.loss, self.loss)

    @property
    def member(self) -> Member:
        """The member of the family, with what is given here in place of its own."""
        own = FAMILY[self.member_name]
        given = {"kl_in": self.kl_in, "kl_estimator": self.kl_estimator, "resample_rounds": self.resample_rounds}
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    @property
    def advantages_kind(self) -> str:
        return self.advantages or FAMILY[self.member_name].advantages

    @property
    def settings(self) -> PolicyLoss:
        """The loss's settings, with what is given here in place of its own."""
        loss = POLICY_LOSSES[LOSS_OF.get(self.member_name, self.member_name)]
        given: dict[str, Any] = {name: getattr(self, name) for name in (*READ_BY, *READ_BY_ALL)} | {"max_tokens": self.sample.max_tokens}
        if self.member.kl_in == "loss":
            given |= {"kl_coef": self.kl_coef, "kl_estimator": self.member.kl_estimator, "kl_weighted": self.kl_weighted}
        return replace(loss, **{name: value for name, value in given.items() if value is not None})
