"""From a plan to the configuration of each stage."""

from __future__ import annotations

from dataclasses import replace

from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.sft_config import SftConfig
from plinth.recipes.pretraining import PretrainConfig
from plinth.scaling.plan_record import Plan
from plinth.tasks.facts import FactsConfig
from plinth.training.config import OptimizerConfig, TrainConfig
from plinth.training.telemetry import TelemetryConfig

SHORTER = 4  # how many times shorter the sequences at the start are
FACTS_PER_FUNCTION = 2.1  # kinds of fact that a function of the standard library has on average


def pretrain_config(plan: Plan, seed: int, telemetry: TelemetryConfig | None = None) -> PretrainConfig:
    """Return the pretraining that a plan decided."""
    train = TrainConfig(
        steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        decay_fraction=plan.decay_steps / plan.steps,
        optimizer=OptimizerConfig(
            name=plan.optimizer, lr=plan.lr, muon_lr=plan.muon_lr, weight_decay=plan.weight_decay, beta2=plan.adam_beta2
        ),
        dtype=plan.dtype,
        seed=seed,
        telemetry=telemetry or TelemetryConfig(),
    )
    return PretrainConfig(
        model=plan.model,
        train=train,
        seq_len=plan.seq_len,
        sequences_per_step=plan.tokens_per_step // plan.seq_len,
        micro_batch_size=plan.micro_batch_size,
        stages=length_stages(plan),
        matmul_flops_per_s=plan.probe.matmul_flops_per_s[plan.dtype],
    )


def length_stages(plan: Plan) -> tuple[tuple[float, int, int], ...] | None:
    """Return short sequences first, then whole ones, as many tokens an update in both; None where there are only whole ones."""
    share, short = plan.config.short_share, plan.seq_len // SHORTER
    if not share or plan.seq_len % SHORTER:
        return None
    return (share, short, plan.tokens_per_step // short), (1.0 - share, plan.seq_len, plan.tokens_per_step // plan.seq_len)


def sft_config(plan: Plan, seed: int, telemetry: TelemetryConfig | None = None, speed: float = 1.0, join_turns: int = 1) -> SftConfig:
    """Return finetuning within its share of the budget; `speed` is the pretraining's measured over its predicted speed."""
    config = SftConfig(tokens=int(plan.stage("sft").tokens * speed), join_turns=join_turns)
    return replace(config, train=replace(config.train, seed=seed, dtype=plan.dtype, telemetry=telemetry or TelemetryConfig()))


def dpo_config(plan: Plan, seed: int, telemetry: TelemetryConfig | None = None, speed: float = 1.0) -> DpoConfig:
    """Return preference tuning within its share of the budget."""
    config = DpoConfig(tokens=int(plan.stage("dpo").tokens * speed))
    return replace(config, train=replace(config.train, seed=seed, dtype=plan.dtype, telemetry=telemetry or TelemetryConfig()))


def facts_config(plan: Plan, seed: int) -> FactsConfig:
    """Return as many facts as finetuning can show often enough, and invented names in proportion."""
    functions = max(50, min(1000, round(plan.num_facts / FACTS_PER_FUNCTION)))
    return FactsConfig(
        num_known=functions,
        num_invented_train=4 * functions,  # many names once teach what is unknown better than few names often
        phrasings_per_invented=1,
        num_invented_pairs=functions // 2,
        num_counterfactual_pairs=functions // 2,
        num_over_refusal_pairs=functions,  # as many pairs against refusing as for it
        seed=seed,
    )
