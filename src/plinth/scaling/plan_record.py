"""A plan as a value: every choice, every prediction, and where each came from; what was predicted against what came."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from plinth.config import UserError, from_dict, nearest, read_json, save_json
from plinth.models.config import DecoderConfig
from plinth.scaling.budget import Budget
from plinth.scaling.corpus import CorpusStats
from plinth.scaling.plan_config import PlanConfig
from plinth.scaling.probe import Probe


@dataclass(frozen=True)
class StageBudget:
    """What one stage of training may spend."""

    stage: str
    """pretrain, sft or dpo"""
    share: float
    """share of the whole budget"""
    time_s: float
    """seconds"""
    tokens: int
    """tokens that fit, padding included"""


@dataclass(frozen=True)
class Predicted:
    """What the plan expects."""

    bpb: float
    """bits per byte on held-out text, after pretraining"""
    loss_nats: float
    """the same in nats a token of the plan's vocabulary"""
    time_s: float
    """seconds of pretraining"""
    tokens_per_s: float
    """tokens a second in pretraining"""
    mfu: float
    """share of the measured matrix rate that pretraining uses"""
    flops: float
    """FLOPs of pretraining"""
    memory_bytes: int
    """peak memory of pretraining, bytes"""
    energy_j: float
    """energy of pretraining, joules"""
    cost: float
    """price of pretraining, in the currency of price_per_hour"""
    total_time_s: float
    """seconds of all stages of training, reserve included"""
    total_energy_j: float
    """energy of all stages of training, joules"""
    total_cost: float
    """price of all stages of training, in the currency of price_per_hour"""


@dataclass(frozen=True)
class LawPrediction:
    """What one law says of the chosen run."""

    law: str
    """short name"""
    source: str
    """publication, or the runs that it was fitted on"""
    bpb: float
    """predicted bits per byte"""
    optimal_params: float
    """parameters of the blocks that it would choose for the FLOPs of this run, were text unlimited"""
    outside_fit: bool
    """whether the run lies outside the sizes and lengths of its fit"""


@dataclass(frozen=True)
class Alternative:
    """A run that was not chosen."""

    num_layers: int
    """blocks"""
    hidden_size: int
    """width"""
    vocab_size: int
    """entries of the tokenizer"""
    num_params: int
    """parameters, embeddings included"""
    tokens: int
    """tokens of pretraining"""
    epochs: float
    """passes over the text"""
    tokens_per_s: float
    """predicted tokens a second"""
    bpb: float
    """predicted bits per byte"""
    chosen: bool
    """whether this is the plan"""


@dataclass(frozen=True)
class Plan:
    """A whole run, decided before it starts."""

    budget: Budget
    """what the user gave"""
    model: DecoderConfig
    """the model"""
    num_params: int
    """its parameters, embeddings included"""
    body_params: int
    """its parameters without embedding and head: N of the laws"""
    vocab_size: int
    """entries of the tokenizer"""
    seq_len: int
    """training context, tokens"""
    tokens_per_step: int
    """tokens an update"""
    micro_batch_size: int
    """sequences a forward pass"""
    steps: int
    """updates of pretraining"""
    tokens: int
    """tokens of pretraining"""
    epochs: float
    """passes over the text"""
    dtype: str
    """dtype of matrix products: float32 or bfloat16"""
    compile: bool
    """whether torch.compile pays back within the budget"""
    optimizer: str
    """adamw or muon, for the matrices of the blocks"""
    lr: float
    """peak learning rate of AdamW"""
    muon_lr: float
    """peak learning rate of Muon, where it is used"""
    weight_decay: float
    """decoupled weight decay"""
    adam_beta2: float
    """decay of AdamW's second moment"""
    warmup_steps: int
    """updates in which the learning rate rises"""
    decay_steps: int
    """updates at the end in which it falls to zero"""
    stages: tuple[StageBudget, ...]
    """what each stage may spend"""
    num_facts: int
    """facts that finetuning can show exposures_per_fact times; 0 without instruction data"""
    predicted: Predicted
    """expected results"""
    laws: tuple[LawPrediction, ...]
    """the chosen run under every law; the first is the one that chose"""
    alternatives: tuple[Alternative, ...]
    """the nearest runs by predicted loss, the chosen one among them"""
    sources: dict[str, str]
    """for each quantity, the law, rule or measurement that it comes from, with its reference"""
    warnings: tuple[str, ...]
    """what to doubt"""
    corpus: CorpusStats
    """the text as measured"""
    probe: Probe
    """the machine as measured"""
    config: PlanConfig
    """what the user decided"""

    def stage(self, name: str) -> StageBudget:
        """Return the budget of a stage; zero if the plan has none for it."""
        for stage in self.stages:
            if stage.stage == name:
                return stage
        return StageBudget(name, 0.0, 0.0, 0)


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON."""
    save_json(path, plan)


def load_plan(path: Path) -> Plan:
    """Read a plan. Raises UserError that names the file and the field that does not fit."""
    return from_dict(Plan, read_json(path), where=f"{path}: ")


def compare(plan: Plan, actual: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return predicted against actual for every quantity that both know.

    `actual` may hold any field of Predicted, and steps and tokens. Each entry of the result has predicted, actual, error
    (actual / predicted - 1; None where predicted is zero) and law, what the prediction came from. Raises UserError for a
    quantity that a plan does not predict.
    """
    expected: dict[str, float] = {name: getattr(plan.predicted, name) for name in (field.name for field in fields(plan.predicted))}
    expected |= {"steps": float(plan.steps), "tokens": float(plan.tokens)}
    rows = {}
    for name, value in actual.items():
        if name not in expected:
            raise UserError(f"{name} is not a quantity that a plan predicts.{nearest(name, expected)}")
        error = value / expected[name] - 1.0 if expected[name] else None
        rows[name] = {"predicted": expected[name], "actual": value, "error": error, "law": plan.sources.get(name, "")}
    return rows
