"""PPO: a policy learns from rewards of its own completions, with a critic, and a KL that ties it to the model it came from.

Roll-out, scores, rewards a token, advantages, then passes of clipped updates; then the next roll-out. What may be done in more than one
way is in ppo_config.py, the arithmetic in ppo_experience.py, policy_losses.py and advantage.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plinth.models.hub import load_decoder
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.posttraining.actor_critic import ActorCritic, View, new_actor_critic
from plinth.posttraining.adapter_files import count_trained, publish_model, with_adapters
from plinth.posttraining.adapter_training import adapted_job
from plinth.posttraining.examples import Prompt
from plinth.posttraining.policy_losses import PolicyBatch, policy_loss, value_loss
from plinth.posttraining.ppo_config import PpoConfig
from plinth.posttraining.ppo_experience import RewardState, advantages, end_completions, joint_advantages, measures, shape_scores
from plinth.posttraining.pretrain_mix import PretrainMix, read_texts
from plinth.posttraining.prompts import matching, prompt_tokens, read_prompts
from plinth.posttraining.reward import load_reward
from plinth.posttraining.reward_sources import LearntReward, RewardSource, open_reward, open_rule
from plinth.posttraining.rollout_batches import RolloutBatches, choose_prompts
from plinth.posttraining.rollouts import SCORED_ROWS, Rollouts, Rows, Sampler, take_rows
from plinth.run import Run, file_sha256, find_model, tree_sha256
from plinth.tokenizer.encode import Tokenizer
from plinth.training.device import choose_device, move_batch
from plinth.training.job import Job, run_job
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import Scale
from plinth.training.precision import DTYPES
from plinth.training.step import Sum


def view_of(config: PpoConfig) -> View:
    """Return how updates see rows."""
    return View(config.update_temperature, config.prompt.padding, config.dropout, config.critic.reads_prompt)


def ppo_loss(model: ActorCritic, batch: Rows, config: PpoConfig) -> tuple[torch.Tensor, Sum, dict[str, Sum]]:
    """Return (loss_sum, tokens, metrics) of a micro-batch: clipped surrogate plus critic.coef times the value loss, both sums over tokens.

    Rows hold what `Rollouts.rows` gives, reference, values, advantages and returns (N, C). A micro-batch of the pretraining mix counts no
    token: its loss has its weight already (`PretrainMix`).
    Source: Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
    """
    if "inputs" in batch:
        loss, _, _ = causal_lm_loss(model.policy, (batch["inputs"], batch["targets"]))
        weight = batch["weight"]
        return weight * loss, 0.0, {"ptx_loss": float(weight * loss.detach())}
    judged, mask = model.judge(batch, view_of(config)), batch["mask"]
    sampled = PolicyBatch(judged.log_probs_BT, batch["log_probs"], batch["advantages"], mask, batch["reference"])
    total, count, measured = policy_loss(sampled, config.policy)
    missed, _, more = value_loss(judged.values_BT, batch["values"], batch["returns"], mask, clip=config.critic.clip)
    losses = {"policy_loss": float(total.detach()), "value_loss": float(missed.detach()), "entropy": float(judged.entropy_BT.sum())}
    metrics: dict[str, Sum] = {**measured, **more, **losses}
    return total + config.critic.coef * missed, count, metrics


@dataclass
class Learner:
    """What collects roll-outs: policy and critic in training, the reference, prompts, and where rewards come from."""

    model: ActorCritic
    """in training"""
    reference: Transformer
    """the policy as it came in"""
    tokenizer: Tokenizer
    """of both"""
    prompts: list[Prompt]
    """what is asked"""
    tokens: list[list[int]]
    """of each prompt"""
    reward: RewardSource
    """where scores come from"""
    config: PpoConfig
    """resolved before the first roll-out"""

    def __post_init__(self) -> None:
        self.state = RewardState(self.config.kl.coef)
        self.end_ids = self.tokenizer.end_ids
        self._sampler: Sampler | None = None

    def begin(self, config: PpoConfig) -> None:
        """Make ready for the first roll-out; called when the configuration is resolved."""
        self.config = config
        device = choose_device(config.train.device)
        self.reference = self.reference.to(device, DTYPES[config.train.dtype or "float32"]).eval()
        if isinstance(self.reward, LearntReward):
            self.reward.model.to(device)
        ends = () if config.end.fixed_length else self.end_ids
        longest = max(map(len, self.tokens))
        self._sampler = Sampler(self.model.policy, ends, config.sample, config.train.num_threads or 1, longest)

    def close(self) -> None:
        """End the threads."""
        if self._sampler is not None:
            self._sampler.close()

    def collect(self, number: int) -> tuple[Rows, dict[str, float]]:
        """Sample and score roll-out `number` with the weights as they are; return its rows and metrics."""
        assert self._sampler is not None
        config, seed = self.config, self.config.train.seed
        chosen = choose_prompts(len(self.tokens), config.prompts_per_rollout, seed, number)
        rollouts = self._sampler.sample([self.tokens[i] for i in chosen], [seed, number])
        rollouts, texts = end_completions(rollouts, config.end, self.tokenizer, self.end_ids)
        asked = [self.prompts[i] for i in chosen for _ in range(config.sample.group_size)]
        found = self.reward.score(asked, texts)
        if config.reward.normalise and number == 0:
            self.state.normalise(found)
        rows = self._rows(rollouts, shape_scores(found, rollouts.finished, self.state, config.reward, config.end))
        rows |= advantages(rows, config)
        metrics = {"reward": sum(found) / len(found), **measures(rows)}
        if config.watch is not None:
            metrics["gold"] = sum(open_rule(config.watch).score(asked, texts)) / len(texts)
        self.state.adapt(metrics["kl"], len(texts), config.kl)
        return rows, metrics

    def _rows(self, rollouts: Rollouts, scores: torch.Tensor) -> Rows:
        assert self._sampler is not None
        rows = rollouts.rows(self.tokenizer.pad_id or 0)
        rows["reference"] = self._sampler.score(rows, self.reference)
        rows["values"], rows["end_values"] = self._values(rows)
        rows["scores"] = scores
        rows["kl_coef"] = torch.full_like(scores, self.state.kl_coef)
        return rows

    def _values(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the critic's values before each token (N, C) and behind the last (N,), without gradient."""
        assert self._sampler is not None
        values, ends = torch.zeros(rows["mask"].shape), torch.zeros(len(rows["mask"]))
        view = replace(view_of(self.config), dropout=0.0)
        device = choose_device(self.config.train.device)

        def judge(part: torch.Tensor) -> None:
            with torch.no_grad():  # which each thread has for itself
                found, end = self.model.values(move_batch(take_rows(rows, part), device), view)
            values[part, : found.shape[1]], ends[part] = found.float().cpu(), end.float().cpu()

        order = torch.argsort(rows["mask"].sum(1), stable=True)
        self._sampler.workers.map(judge, order.split(SCORED_ROWS))
        return values, ends


class PpoBatches:
    """The micro-batches of each update: completions, whitened over the update where that is asked for, and texts of pretraining."""

    def __init__(self, frame: RolloutBatches, mix: PretrainMix | None, config: PpoConfig):
        self.frame, self.mix, self.config = frame, mix, config

    def at(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Return the micro-batches of a step counted from 0."""
        parts = self.frame.batches_at(step)
        if self.config.advantage.over == "minibatch":
            parts = joint_advantages(parts, self.config)
        if self.mix is None:
            return parts
        tokens = sum(int(part["mask"].sum()) for part in parts)
        return parts + self.mix.batches(step, self.config.ptx.rows_per_update or sum(len(part["mask"]) for part in parts), tokens)


def train_ppo(
    out: Path,
    model_run: Path,
    reward: str,
    prompts_file: Path,
    config: PpoConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Tune a run's model towards a reward and publish it as out/model.

    `reward` is a run of a reward model or the name of a rule (`find_rule`); prompts come from any file that `read_prompts` reads.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    learners: list[Learner] = []

    def prepare(config: PpoConfig) -> Job:
        given = open_reward(reward)
        base = load_decoder(source)
        longest = base.config.max_seq_len - config.sample.max_tokens
        asked = matching(read_prompts(prompts_file), config.prompt.pattern)
        asked, tokens, left = prompt_tokens(tokenizer, asked, longest, config.prompt.too_long)
        given.check(asked)
        if config.watch is not None:
            open_rule(config.watch).check(asked)
        model = _actor_critic(config, source, base, given)
        learner = Learner(model, base, tokenizer, asked, tokens, given, config)
        learners.append(learner)
        frame = RolloutBatches(
            learner.collect, config.epochs, config.minibatches, config.micro_batch_size, seed=config.train.seed, reshuffle=config.reshuffle
        )
        batches = PpoBatches(frame, _mix(config, tokenizer, base.config.max_seq_len), config)
        trained = count_trained(model.policy)

        def summarise(summary: dict[str, Any]) -> dict[str, Any]:
            counts = {"completions": (frame.number + 1) * config.completions_per_rollout, "trained_params": trained}
            kept = {name: value for name, value in summary.items() if name != "tokens"}
            return kept | {"prompts": len(asked)} | left | counts | frame.metrics(summary["steps"])

        job = Job(
            model,
            lambda model, batch: ppo_loss(model, batch, config),
            batches.at,
            steps=config.steps,
            tokenizer=tokenizer,
            description="PPO",
            data=_identity(config, tokenizer, source, prompts_file, given),
            scales={name: Scale(lr=config.critic.lr_factor) for name in model.critic_names()},
            extra_state={"rollout": frame, "reward": learner.state},
            begin=lambda run, config: learner.begin(config),
            step_metrics=frame.metrics,
            publish=lambda folder: publish_model(model.policy, tokenizer, folder, str(source)),
            summarise=summarise,
        )
        return adapted_job(job, config.adapter, config.train)

    parents = [model_run, prompts_file, *([Path(reward)] if Path(reward).exists() else [])]
    try:
        return run_job(out, "ppo", config, prepare, parents=parents, resume=resume, argv=argv, warn=warn)
    finally:
        for learner in learners:
            learner.close()


def _actor_critic(config: PpoConfig, source: Path, base: Transformer, reward: RewardSource) -> ActorCritic:
    """Return policy and critic as CriticConfig has them."""
    start: RewardModel | None = None
    if config.critic.trunk == "separate":
        if config.critic.start is not None:
            start = load_reward(config.critic.start).model
        elif isinstance(reward, LearntReward) and reward.model.config.vocab_size == base.config.vocab_size:
            start = reward.model
    policy = with_adapters(load_decoder(source), config.adapter, config.train.seed)
    generator = torch.Generator().manual_seed(config.train.seed)
    head = config.critic.head or "zero"
    return new_actor_critic(policy, base, trunk=config.critic.trunk, start=start, head=head, generator=generator)


def _mix(config: PpoConfig, tokenizer: Tokenizer, max_seq_len: int) -> PretrainMix | None:
    if config.ptx.texts is None:
        return None
    rows = read_texts(config.ptx.texts, tokenizer, min(config.ptx.max_tokens or max_seq_len, max_seq_len))
    return PretrainMix(rows, config.ptx.coef, config.micro_batch_size, config.train.seed, tokenizer.pad_id or 0)


def _identity(config: PpoConfig, tokenizer: Tokenizer, source: Path, prompts: Path, reward: RewardSource) -> dict[str, Any]:
    """Return what a run may only be resumed with."""
    texts = {} if config.ptx.texts is None else {"texts_sha256": file_sha256(config.ptx.texts)}
    return {
        "prompts_sha256": file_sha256(prompts),
        "tokenizer_sha256": tokenizer.sha256,
        "base_sha256": tree_sha256(source),
        "seed": config.train.seed,
        **texts,
        **reward.identity(),
    }
