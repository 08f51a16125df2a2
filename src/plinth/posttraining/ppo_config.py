"""What PPO may do in more than one way: every detail that implementations differ in is a field here, and docs/ppo.md lists them.

"item" is the number in "The N Implementation Details of RLHF with PPO" (Huang et al. 2023); "N+" is arXiv:2403.17031.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plinth.config import UserError
from plinth.posttraining.lora_config import LoraConfig, refuse_dropout
from plinth.posttraining.policy_config import PolicyLoss
from plinth.posttraining.rollout_config import SampleConfig
from plinth.training.config import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts are asked, and how they stand in a batch."""

    pattern: str | None = None
    """item 12: ask only prompts whose last message this regular expression matches, as `\\\\.$` for those that end with a full stop"""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """item 2: what to do with a prompt that leaves no room for the completion; truncate keeps its end"""
    padding: Literal["right", "left", "left_unadjusted"] = "right"
    """item 3: side of the padding in updates; left_unadjusted leaves positions and attention as if the padding were text"""


@dataclass(frozen=True)
class EndConfig:
    """When a completion ends, and what one that does not is worth."""

    fixed_length: bool = False
    """item 4: sample max_tokens tokens whatever comes; the score is that of the text before the first end token"""
    truncate_at: str | None = None
    """item 14: end a completion behind the first token that holds this text, as a full stop, from `truncate_from` on"""
    truncate_from: int = 16
    """item 14: tokens before such an end is looked for"""
    missing_score: float | None = None
    """item 14 and N+'s EOS trick: score of a completion that did not end, in place of its own (OpenAI and N+: -1)"""
    missing_penalty: float = 0.0
    """what is taken off the score of a completion that did not end (TRL: 1)"""


@dataclass(frozen=True)
class RewardShape:
    """What becomes of a score before advantages are taken."""

    normalise: bool = False
    """item 9: shift and scale scores so that the first roll-out's, which are the reference's, have mean 0 and deviation 1"""
    clip: float | None = None
    """largest absolute score (OpenRLHF: 10)"""
    whiten: bool = False
    """item 18: divide rewards a token by their deviation; their mean stays"""
    place: Literal["last_token", "past_end"] = "last_token"
    """item 7: where the score stands: at the last token, or one place behind it, so that λ discounts it (TRL 1.12)"""


@dataclass(frozen=True)
class KlConfig:
    """The tie to the reference, which is the model as it comes in."""

    coef: float = 0.05
    """β, the factor of the KL to the reference in the reward: how much score a nat must bring"""
    per_token: bool = True
    """item 17: take the KL off at each token; without it, its sum off the score"""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimate of a token's KL, see `kl_estimate`"""
    target: float | None = None
    """item 20: KL in nats a completion that the coefficient adapts towards (OpenAI: 6, from coef 0.15); None keeps it"""
    horizon: int = 10_000
    """item 20: completions over which it adapts"""


@dataclass(frozen=True)
class AdvantageConfig:
    """Generalised advantage estimation."""

    gamma: float = 1.0
    """item 15: discount a token"""
    lam: float = 0.95
    """λ of the estimate: 1 trusts the rewards that came, 0 the critic"""
    whiten: bool = True
    """item 18: shift and scale advantages to mean 0 and deviation 1"""
    over: Literal["rollout", "minibatch"] = "rollout"
    """item 18: what whitening goes over; OpenAI's code whitened each minibatch, its rewards before the advantages were taken"""
    unbiased: bool = True
    """item 18: divide squares by n - 1 as PyTorch does; TensorFlow divided by n"""


@dataclass(frozen=True)
class CriticConfig:
    """The model of expected return."""

    trunk: Literal["separate", "shared"] = "separate"
    """N+: a decoder of its own, or a head on the policy's hidden states"""
    start: Path | None = None
    """N+: run of a reward model that a separate critic begins as (default: the reward where it is such a run, else the policy's weights)"""
    head: Literal["zero", "normal", "reward"] | None = None
    """item 11: how its head begins: 0, drawn as a reward model's is (item 8), or the reward model's own (default: zero)"""
    reads_prompt: bool = True
    """item 1: the critic reads prompt and completion, not the completion alone"""
    coef: float = 0.1
    """weight of the value loss"""
    clip: float | None = 0.2
    """item 19: clip of the value about that at sampling; None for the plain square"""
    lr_factor: float = 1.0
    """factor of the critic's learning rates on the policy's; N+ has 1, OpenRLHF 9"""


@dataclass(frozen=True)
class PtxConfig:
    """The pretraining mix (PPO-ptx)."""

    texts: Path | None = None
    """texts to go on learning in every update, {"text"} a line; None for none"""
    coef: float = 1.0
    """weight of their mean cross-entropy in the loss, in which a token of a completion has weight 1 (InstructGPT: 27.8)"""
    rows_per_update: int | None = None
    """texts an update (default: as many as completions)"""
    max_tokens: int | None = None
    """longest text in tokens, longer ones are cut (default: the context)"""


def _train() -> TrainConfig:
    optimizer = OptimizerConfig(name="adamw", lr=3e-4, beta2=0.999, eps=1e-5, weight_decay=0.0)
    return TrainConfig(
        warmup_steps=0, decay_fraction=1.0, decay="linear", dtype="float32", keep_pre_decay=False, compile=False, optimizer=optimizer
    )


@dataclass(frozen=True)
class PpoConfig:
    """Roll-outs, updates and details of proximal policy optimisation."""

    train: TrainConfig = field(default_factory=_train)
    """optimizer and schedule; item 5: decay=linear over decay_fraction=1 lets the rate fall to 0; item 21: optimizer.tensorflow_eps"""
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(group_size=1, max_tokens=64))
    """how completions are sampled; item 10: temperature divides the logits in training too; item 6: each has a seed of its own"""
    completions: int = 10_000
    """completions sampled in all, which gives the number of updates where train.steps does not"""
    prompts_per_rollout: int = 128
    """prompts of a roll-out, each with sample.group_size completions"""
    epochs: int = 4
    """passes over a roll-out"""
    minibatches: int = 1
    """updates a pass"""
    micro_batch_size: int = 16
    """completions a forward pass"""
    reshuffle: bool = True
    """item 16: deal each pass anew"""
    train_at_temperature: bool = True
    """item 10: divide the logits by the temperature in updates too; without it the ratio of policy to sampler begins off 1"""
    dropout: float = 0.0
    """item 13: share of the last hidden states' numbers that updates drop; published decoders have no other dropout"""
    policy: PolicyLoss = field(default_factory=PolicyLoss)
    """clipped surrogate; policy.kl_coef puts a KL into the loss (in place of kl.coef, or beside it)"""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """which prompts are asked"""
    end: EndConfig = field(default_factory=EndConfig)
    """when completions end"""
    reward: RewardShape = field(default_factory=RewardShape)
    """scores on their way to advantages"""
    kl: KlConfig = field(default_factory=KlConfig)
    """the tie to the reference"""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """advantages"""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """the critic"""
    ptx: PtxConfig = field(default_factory=PtxConfig)
    """the pretraining mix"""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """train adapters in place of the policy's weights"""
    watch: str | None = None
    """a rule (reward_sources.find_rule) that is measured beside the reward, as `gold`; nothing learns from it"""

    def __post_init__(self) -> None:
        for name in ("completions", "prompts_per_rollout", "epochs", "minibatches", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.policy.aggregation != "token":
            raise UserError(f"policy.aggregation={self.policy.aggregation!r} does not fit the value loss, a mean over tokens. Use token.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.kl.coef < 0 or not 0 <= self.advantage.lam <= 1 or not 0 < self.advantage.gamma <= 1:
            raise UserError(
                f"kl.coef={self.kl.coef} must be 0 or more, advantage.lam={self.advantage.lam} and gamma={self.advantage.gamma} "
                "between 0 and 1."
            )
        if self.kl.target is not None and (self.kl.target <= 0 or self.kl.coef == 0):
            raise UserError(f"kl.target={self.kl.target} must be positive, and kl.coef={self.kl.coef} that adapts to it too.")
        if self.critic.trunk == "shared" and self.critic.start is not None:
            raise UserError(f"critic.start={self.critic.start} is for a trunk of its own. Use critic.trunk=separate, or leave it out.")
        if self.prompt.pattern is not None:
            _check_pattern(self.prompt.pattern)
        refuse_dropout(self.adapter)

    @property
    def completions_per_rollout(self) -> int:
        """Completions of a roll-out."""
        return self.prompts_per_rollout * self.sample.group_size

    @property
    def steps(self) -> int:
        """Updates that `completions` gives."""
        return math.ceil(self.completions / self.completions_per_rollout) * self.epochs * self.minibatches

    @property
    def update_temperature(self) -> float:
        """What the logits are divided by in updates."""
        return self.sample.temperature if self.train_at_temperature else 1.0


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"prompt.pattern={pattern!r} is no regular expression: {error}.") from None
