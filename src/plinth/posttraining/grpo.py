"""Reinforcement learning with verifiable rewards: GRPO and its kin, on roll-outs of the policy by our own engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from plinth.config import UserError, nearest
from plinth.inference.text import end_ids
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.posttraining.adapter_files import publish_model, with_adapters
from plinth.posttraining.adapter_training import adapted_job, refuse_dropout
from plinth.posttraining.advantage import (
    global_advantages,
    group_advantages,
    informative_groups,
    kl_estimate,
    leave_one_out_advantages,
    separate_reward_advantages,
)
from plinth.posttraining.completion_scores import completion_log_probs
from plinth.posttraining.examples import Examples, Prompt
from plinth.posttraining.formats import read_examples
from plinth.posttraining.lora import LoraConfig
from plinth.posttraining.policy_losses import POLICY_LOSSES, PolicyBatch, PolicyLoss, policy_loss
from plinth.posttraining.reward_sources import Rule
from plinth.posttraining.rewards import RewardConfig, overlong_punishment, score_rollouts
from plinth.posttraining.rollout_batches import RolloutBatches, choose_prompts
from plinth.posttraining.rollouts import Rollouts, Rows, SampleConfig, Sampler
from plinth.run import Run, file_sha256, find_model, tree_sha256, usable_cores
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from plinth.training.step import Sum


@dataclass(frozen=True)
class Member:
    """What a member of the family adds to its loss (policy_losses.POLICY_LOSSES)."""

    advantages: str = "group"
    """group, none (the mean of the group taken off, no division), leave_one_out, global, global_baseline, or separate"""
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
    "cispo": Member(),
    "sapo": Member(),
    "luspo": Member(),
    "rloo": Member("leave_one_out", "reward", "k1"),
    "reinforce_pp": Member("global", "reward", "k1"),
    "reinforce_pp_baseline": Member("global_baseline", "loss", "k2"),
}
ALIASES = {"reinforce++": "reinforce_pp", "reinforce++_baseline": "reinforce_pp_baseline", "reinforce++-baseline": "reinforce_pp_baseline"}
LOSS_OF = {"reinforce_pp_baseline": "reinforce_pp"}
ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "group": group_advantages,
    "none": lambda rewards_PG: group_advantages(rewards_PG, scale="none"),
    "batch": lambda rewards_PG: group_advantages(rewards_PG, scale="batch"),
    "leave_one_out": leave_one_out_advantages,
    "global": global_advantages,
    "global_baseline": lambda rewards_PG: global_advantages(rewards_PG, group_baseline=True),
}


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
    """grpo, dr_grpo, dapo, gspo, cispo, sapo, luspo, rloo, reinforce++ or reinforce++_baseline; see docs/grpo.md"""
    advantages: Literal["group", "batch", "none", "leave_one_out", "global", "global_baseline", "separate"] | None = None
    """baseline and scale of rewards; separate normalises each of several rewards by itself (default: the loss's own)"""
    epsilon_low: float | None = None
    """the ratio of policy to sampler is clipped below one minus this (default: the loss's own)"""
    epsilon_high: float | None = None
    """the ratio is clipped above one plus this; DAPO's clip-higher is 0.28 (default: the loss's own)"""
    kl_coef: float = 0.0
    """weight of the KL to the model that training began with"""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """estimator of a KL within the loss (default: the loss's own, k3 for most)"""
    kl_in: Literal["loss", "reward"] | None = None
    """whether the KL is part of the loss or taken off the reward (default: the loss's own)"""
    prompts_per_rollout: int = 32
    """prompts that a roll-out asks"""
    rollouts: int = 100
    """roll-outs in all, where train.steps names no number of updates"""
    epochs: int = 1
    """passes over a roll-out"""
    minibatches: int = 1
    """updates a pass"""
    micro_batch_size: int = 64
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
        for name in ("prompts_per_rollout", "rollouts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.kl_coef < 0:
            raise UserError(f"kl_coef={self.kl_coef} must be 0 or more.")
        if self.sample.group_size < 2 and self.advantages_kind not in ("global",):
            raise UserError("sample.group_size=1 leaves no other completion to compare with. Sample 2 or more, or use advantages=global.")
        if self.mask_unfinished and self.advantages_kind not in ("group", "batch", "none"):
            raise UserError(f"mask_unfinished does not go with advantages={self.advantages_kind}. Use group, batch or none.")
        if self.overlong_margin_tokens is not None and not 0 < self.overlong_margin_tokens < self.sample.max_tokens:
            raise UserError(f"overlong_margin_tokens={self.overlong_margin_tokens} must lie between 1 and sample.max_tokens - 1.")
        refuse_dropout(self.adapter)
        self.settings  # noqa: B018 - its own checks

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
        given: dict[str, Any] = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high, "max_tokens": self.sample.max_tokens}
        if self.member.kl_in == "loss":
            given |= {"kl_coef": self.kl_coef, "kl_estimator": self.member.kl_estimator}
        return replace(loss, **{name: value for name, value in given.items() if value is not None})


def completion_loss(
    policy: Transformer, rows: Rows, settings: PolicyLoss, temperature: float = 1.0, group_size: int = 1
) -> tuple[torch.Tensor, Sum, dict[str, Sum]]:
    """Return (loss_sum, count, metrics) of sampled completions; see `policy_losses.policy_loss`.

    rows are those of `Rollouts.rows` with advantages (N,), trained (N,), which is false for completions that count nothing, and the
    reference's log-probabilities (N, C) where a KL is part of the loss.
    """
    scores = completion_log_probs(policy, rows, temperature, group_size=group_size)
    mask_BT = rows["mask"] & rows["trained"][:, None]
    batch = PolicyBatch(scores.log_probs_BT, rows["log_probs"], rows["advantages"][:, None], mask_BT, rows.get("reference"))
    total, count, metrics = policy_loss(batch, settings)
    if settings.aggregation == "fixed_length":  # whose count is no number of tokens
        tokens = max(1, int(mask_BT.sum()))
        metrics = {name: value * count / tokens for name, value in metrics.items()}
    return total, count, dict(metrics)


@dataclass
class Collector:
    """Samples a roll-out, rewards it and gives each completion its advantage; `RolloutBatches` calls it with the roll-out's number."""

    sampler: Sampler
    problems: Sequence[Prompt]
    prompts: Sequence[list[int]]
    """the problems' token ids"""
    tokenizer: Tokenizer
    config: GrpoConfig
    reference: Callable[[], Transformer] | None = None
    """loads the model that the KL is to; None where there is none"""
    own_rewards: Mapping[str, Rule] = field(default_factory=dict)

    def __call__(self, number: int) -> tuple[Rows, dict[str, float]]:
        began, config = time.perf_counter(), self.config
        size = config.sample.group_size
        rollouts, rewards_KN, first = self._attempt(number, 0, config.prompts_per_rollout)
        metrics = dict(first)
        spread_P = self._spread(rewards_KN)
        if not (config.keep_zero_spread or config.kl_coef):
            kept = spread_P.nonzero()[:, 0].tolist()
            rollouts, rewards_KN, metrics["resampled_groups"] = self._refilled(number, rollouts, rewards_KN, kept)
        total_N = (config.reward.weights_K[:, None] * rewards_KN).sum(0)
        rows = rollouts.rows(self.tokenizer.pad_id or 0)
        rows["trained"] = ~total_N.isnan()
        if self.reference is not None:
            rows["reference"] = self.sampler.score(rows, self._reference_model())
            kl_NC = kl_estimate(rows["log_probs"], rows["reference"], "k1") * rows["mask"]
            metrics["kl"] = float(kl_NC.sum() / len(kl_NC))
            if config.member.kl_in == "reward":
                total_N = total_N - config.kl_coef * kl_NC.sum(1)
        rows["advantages"] = self._advantages(rewards_KN, total_N.view(-1, size)).flatten()
        metrics["groups"] = len(rollouts.prompts)
        metrics["engine_gap"] = rollouts.engine_gap
        metrics["rollout_s"] = time.perf_counter() - began
        return rows, metrics

    def _attempt(self, number: int, attempt: int, count: int) -> tuple[Rollouts, torch.Tensor, dict[str, float]]:
        """Sample and reward once; returns also what the policy's completions are like."""
        config, seed = self.config, [self.config.train.seed, number, attempt]
        chosen = choose_prompts(len(self.prompts), count, config.train.seed, number, attempt)
        rollouts = self.sampler.sample([self.prompts[i] for i in chosen], seed)
        texts = [self.tokenizer.decode(rollouts.answer_tokens(i)) for i in range(len(rollouts))]
        rewards_KN = score_rollouts(
            config.reward, [self.problems[i] for i in chosen], rollouts, texts, seed=[*seed, 1], max_tokens=config.sample.max_tokens,
            own=self.own_rewards, workers=self.sampler.workers,
        )  # fmt: skip
        metrics = self._metrics(rollouts, rewards_KN)
        lengths_N = torch.tensor([len(tokens) for tokens in rollouts.completions])
        if config.overlong_margin_tokens is not None:
            punished_N = overlong_punishment(lengths_N, config.sample.max_tokens, config.overlong_margin_tokens)
            rewards_KN = rewards_KN + punished_N / config.reward.weights_K.sum()  # by weight it is the punishment itself
        if config.mask_unfinished:
            rewards_KN = rewards_KN.masked_fill(~torch.tensor(rollouts.finished), torch.nan)
        metrics["zero_spread_groups"] = 1.0 - float(self._spread(rewards_KN).float().mean())
        return rollouts, rewards_KN, metrics

    def _metrics(self, rollouts: Rollouts, rewards_KN: torch.Tensor) -> dict[str, float]:
        config, names = self.config.reward, self.config.reward.rewards
        tokens = sum(map(len, rollouts.completions))
        means = rewards_KN.nanmean(1).tolist()
        return {
            "reward": float((config.weights_K * torch.tensor(means)).sum()),
            **({f"reward_{name.partition(':')[0]}": value for name, value in zip(names, means)} if len(names) > 1 else {}),
            "completion_tokens": tokens / len(rollouts),
            "finished": sum(rollouts.finished) / len(rollouts),
            "entropy": -sum(map(sum, rollouts.log_probs)) / tokens,  # what was sampled estimates it without bias
        }

    def _spread(self, rewards_KN: torch.Tensor) -> torch.Tensor:
        """Return which groups have completions of different rewards, (P,); with separate rewards, of any of them."""
        size = self.config.sample.group_size
        if self.config.advantages_kind == "separate":
            return torch.stack([informative_groups(row.view(-1, size)) for row in rewards_KN]).any(0)
        return informative_groups((self.config.reward.weights_K[:, None] * rewards_KN).sum(0).view(-1, size))

    def _refilled(self, number: int, rollouts: Rollouts, rewards_KN: torch.Tensor, kept: list[int]) -> tuple[Rollouts, torch.Tensor, int]:
        """Return the groups that have a spread, further ones sampled while there are too few, and how many were sampled for it.

        Where fewer than `minibatches` have one, others stand in: they change nothing.
        """
        config, size = self.config, self.config.sample.group_size
        fallback = rollouts, rewards_KN
        rollouts, rewards_KN, sampled = rollouts.of_groups(kept), _of_groups(rewards_KN, kept, size), 0
        for attempt in range(1, config.member.resample_rounds + 1):
            missing = config.prompts_per_rollout - len(rollouts.prompts)
            if not missing:
                break
            more, more_KN, _ = self._attempt(number, attempt, missing)
            sampled += missing
            found = self._spread(more_KN).nonzero()[:, 0].tolist()
            rollouts = rollouts.joined(more.of_groups(found))
            rewards_KN = torch.cat([rewards_KN, _of_groups(more_KN, found, size)], 1)
        lacking = config.minibatches - len(rollouts.prompts)
        if lacking > 0:
            flat = [i for i in range(len(fallback[0].prompts)) if i not in kept][:lacking]
            rollouts = rollouts.joined(fallback[0].of_groups(flat))
            rewards_KN = torch.cat([rewards_KN, _of_groups(fallback[1], flat, size)], 1)
        return rollouts, rewards_KN, sampled

    def _advantages(self, rewards_KN: torch.Tensor, total_PG: torch.Tensor) -> torch.Tensor:
        if self.config.advantages_kind == "separate":
            return separate_reward_advantages(rewards_KN.view(-1, *total_PG.shape), self.config.reward.weights_K)
        return ADVANTAGES[self.config.advantages_kind](total_PG)

    def _reference_model(self) -> Transformer:
        assert self.reference is not None
        if not hasattr(self, "_reference"):
            weight = self.sampler.model.embed.weight
            self._reference = self.reference().to(weight.device, weight.dtype)
        return self._reference


def _of_groups(rewards_KN: torch.Tensor, groups: list[int], size: int) -> torch.Tensor:
    return rewards_KN.view(len(rewards_KN), -1, size)[:, groups].flatten(1)


def render_prompts(tokenizer: Tokenizer, found: Examples, max_prompt_tokens: int) -> list[list[int]]:
    """Return each problem's tokens, ready for the answer. Raises UserError, with the row's number, for one that is too long."""
    prompts = [render(tokenizer, problem.messages, add_generation_prompt=True).tokens for problem in found.rows]
    for number, prompt in zip(found.numbers, prompts):
        if len(prompt) > max_prompt_tokens:
            raise UserError(
                f"row {number} has a prompt of {len(prompt)} tokens; beside sample.max_tokens the context holds {max_prompt_tokens}. "
                "Shorten it, or lower sample.max_tokens."
            )
    return prompts


def train_grpo(
    out: Path,
    model_run: Path,
    data: Path,
    config: GrpoConfig,
    *,
    rewards: Mapping[str, Rule] | None = None,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train a run's model on problems with a check (formats.py, kind verifiable) and publish it as out/model.

    `rewards` are functions of the caller by name, which config.reward.rewards may name beside the verifiers.
    With adapters these are published as out/adapter and merged into out/model.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    found = read_examples(data, "verifiable")
    if found.rejected or set(found.detected) != {"verifiable"}:
        warn(f"{data}: {found.describe()}")
    own = dict(rewards or {})

    def prepare(config: GrpoConfig) -> Job:
        config.reward.check_names(own, found.rows)
        model = with_adapters(load_decoder(source), config.adapter, config.train.seed)
        sampler = Sampler(model, end_ids(tokenizer), config.sample, config.train.num_threads or usable_cores())
        assert sampler.max_prompt_tokens is not None
        prompts = render_prompts(tokenizer, found, sampler.max_prompt_tokens)
        sampler.max_prompt_tokens = max(map(len, prompts))
        reference = (lambda: load_decoder(source)) if config.kl_coef else None
        collector = Collector(sampler, found.rows, prompts, tokenizer, config, reference, own)
        batches = RolloutBatches(
            collector, config.epochs, config.minibatches, config.micro_batch_size, config.sample.group_size, config.train.seed
        )
        settings, temperature = config.settings, config.sample.temperature

        def publish(folder: Path) -> None:
            sampler.close()
            publish_model(model, tokenizer, folder, str(source))

        job = Job(
            model,
            lambda policy, rows: completion_loss(policy, rows, settings, temperature, config.sample.group_size),
            batches.batches_at,
            steps=config.rollouts * batches.updates,
            tokenizer=tokenizer,
            publish=publish,
            description=f"learning by {config.member_name}",
            data={
                "problems_sha256": file_sha256(data),
                "tokenizer_sha256": tokenizer.sha256,
                "seed": config.train.seed,
                "base_sha256": tree_sha256(source),
            },
            step_metrics=batches.metrics,
            extra_state={"rollout": batches},
            summarise=lambda summary: (
                summary | {"problems": len(found.rows), "rejected": len(found.rejected), "rollouts": batches.number + 1}
            ),
        )
        return adapted_job(job, config.adapter, config.train)

    return run_job(out, "grpo", config, prepare, parents=[model_run, data], resume=resume, argv=argv, warn=warn)
