"""Reinforcement learning with verifiable rewards: GRPO and its kin, on roll-outs of the policy by our own engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plinth.config import UserError
from plinth.data.rejects import row_counts
from plinth.inference.text import end_ids
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.posttraining.adapter_files import publish_model, with_adapters
from plinth.posttraining.adapter_training import adapted_job
from plinth.posttraining.advantage import (
    global_advantages,
    greedy_baseline_advantages,
    group_advantages,
    informative_groups,
    kl_estimate,
    leave_one_out_advantages,
    separate_reward_advantages,
)
from plinth.posttraining.completion_scores import completion_log_probs
from plinth.posttraining.examples import Examples, Prompt
from plinth.posttraining.formats import read_examples
from plinth.posttraining.grpo_config import GrpoConfig
from plinth.posttraining.policy_losses import PolicyBatch, PolicyLoss, policy_loss
from plinth.posttraining.reward_sources import Rule
from plinth.posttraining.rewards import overlong_punishment, score_rollouts
from plinth.posttraining.rollout_batches import RolloutBatches, choose_prompts
from plinth.posttraining.rollouts import Rollouts, Rows, Sampler, pad
from plinth.run import Run, file_sha256, find_model, tree_sha256, usable_cores
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from plinth.training.job import Job, run_job
from plinth.training.step import Sum

ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "group": group_advantages,
    "none": lambda rewards_PG: group_advantages(rewards_PG, scale="none"),
    "batch": lambda rewards_PG: group_advantages(rewards_PG, scale="batch"),
    "leave_one_out": leave_one_out_advantages,
    "greedy": lambda rewards_PG: rewards_PG.nan_to_num(0.0),  # the baseline is off already: `Collector._attempt`
    "global": global_advantages,
    "global_baseline": lambda rewards_PG: global_advantages(rewards_PG, group_baseline=True),
}


def completion_loss(
    policy: Transformer, rows: Rows, settings: PolicyLoss, temperature: float = 1.0, group_size: int = 1
) -> tuple[torch.Tensor, Sum, dict[str, Sum]]:
    """Return (loss_sum, count, metrics) of sampled completions; see `policy_losses.policy_loss`.

    rows are those of `Rollouts.rows` with advantages (N,), trained (N,), which is false for completions that count nothing, the
    reference's log-probabilities (N, C) where a KL is part of the loss, and the engine's where they are not those of the trainer.
    """
    scores = completion_log_probs(policy, rows, temperature, group_size=group_size)
    mask_BT = rows["mask"] & rows["trained"][:, None]
    batch = PolicyBatch(
        scores.log_probs_BT, rows["log_probs"], rows["advantages"][:, None], mask_BT, rows.get("reference"), rows.get("engine")
    )  # fmt: skip
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
        if rollouts.engine_log_probs is not None and (config.mismatch is not None or config.off_policy_threshold is not None):
            rows["engine"] = pad(rollouts.engine_log_probs, 0.0, torch.float32)
            metrics["mismatch_kl"] = float((rows["engine"] - rows["log_probs"])[rows["mask"]].mean())
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
        plain_KN, rewards_KN = self._rewards(chosen, rollouts, [*seed, 1])
        metrics = self._metrics(rollouts, plain_KN)
        if config.mask_unfinished:
            rewards_KN = rewards_KN.masked_fill(~torch.tensor(rollouts.finished), torch.nan)
        if config.advantages_kind == "greedy":
            plain_KP, greedy_KP = self._rewards(chosen, self.sampler.greedy([self.prompts[i] for i in chosen]), [*seed, 2])
            metrics["greedy_reward"] = float((config.reward.weights_K * plain_KP.nanmean(1)).sum())
            rewards_KN = greedy_baseline_advantages(rewards_KN.view(*greedy_KP.shape, -1), greedy_KP).flatten(1)
        metrics["zero_spread_groups"] = 1.0 - float(self._spread(rewards_KN).float().mean())
        return rollouts, rewards_KN, metrics

    def _rewards(self, chosen: list[int], rollouts: Rollouts, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards of completions of the chosen problems, both (K, N), as they are and with the punishment of length."""
        config = self.config
        texts = [self.tokenizer.decode(rollouts.answer_tokens(i)) for i in range(len(rollouts))]
        rewards_KN = score_rollouts(
            config.reward, [self.problems[i] for i in chosen], rollouts, texts, seed=seed, max_tokens=config.sample.max_tokens,
            own=self.own_rewards, workers=self.sampler.workers,
        )  # fmt: skip
        if config.overlong_margin_tokens is None:
            return rewards_KN, rewards_KN
        lengths_N = torch.tensor([len(tokens) for tokens in rollouts.completions])
        punished_N = overlong_punishment(lengths_N, config.sample.max_tokens, config.overlong_margin_tokens)
        return rewards_KN, rewards_KN + punished_N / config.reward.weights_K.sum()  # by weight it is the punishment itself

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
        """Return which groups have an advantage other than 0, (P,): those with completions of different rewards.

        With separate rewards, it is those where any differs. With a greedy baseline, which is off the rewards already, it is those with a
        reward other than the greedy completion's. Where all completions are compared, it is every group unless all have one reward.
        """
        size, kind = self.config.sample.group_size, self.config.advantages_kind
        if kind == "separate":
            return torch.stack([informative_groups(row.view(-1, size)) for row in rewards_KN]).any(0)
        total_PG = (self.config.reward.weights_K[:, None] * rewards_KN).sum(0).view(-1, size)
        if kind == "greedy":
            return total_PG.nan_to_num(0.0).any(1)
        if kind == "global":
            return informative_groups(total_PG.view(1, -1)).expand(len(total_PG)) & ~total_PG.isnan().all(1)
        return informative_groups(total_PG)

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
        threads, compares = config.train.num_threads or usable_cores(), config.mismatch is not None
        sampler = Sampler(model, end_ids(tokenizer), config.sample, threads, compares=compares)
        assert sampler.max_prompt_tokens is not None
        prompts = render_prompts(tokenizer, found, sampler.max_prompt_tokens)
        sampler.max_prompt_tokens = max(map(len, prompts))
        reference = (lambda: load_decoder(source)) if config.kl_coef else None
        collector = Collector(sampler, found.rows, prompts, tokenizer, config, reference, own)
        batches = RolloutBatches(
            collector, config.epochs, config.minibatches, config.micro_batch_size, config.sample.group_size, config.train.seed
        )
        settings, temperature = config.settings, config.sample.temperature

        def summarise(summary: dict[str, Any]) -> dict[str, Any]:
            last = batches.metrics(summary["steps"])
            if last["zero_spread_groups"] == 1.0:
                warn(
                    f"in the last roll-out all completions of a prompt had the same reward ({last['reward']:.3g} on average), so that it "
                    "taught nothing: the problems are too hard, or too easy. docs/grpo.md says what helps."
                )
            counts = {"problems": len(found.rows), **row_counts(len(found.rejected)), "rollouts": batches.number + 1}
            return summary | counts | {name: value for name, value in last.items() if name != "rollout"}

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
            summarise=summarise,
        )
        return adapted_job(job, config.adapter, config.train)

    return run_job(out, "grpo", config, prepare, parents=[model_run, data], resume=resume, argv=argv, warn=warn)
