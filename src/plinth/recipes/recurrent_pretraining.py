"""Pretraining an AWD-LSTM on token shards: every row of the batch goes on, step by step, through a long stretch of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.contiguous import ContiguousText
from plinth.data.shards import open_split
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.ops.dropout import step_seeds
from plinth.recipes.pretraining import check_shards
from plinth.run import Run
from plinth.tokenizer.encode import Tokenizer
from plinth.training.carried_state import CarriedState
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.objectives_recurrent import awd_lstm_loss
from plinth.training.optim import OptimizerConfig

HELDOUT_ROWS = 16  # stretches of held-out text that are scored side by side
COUNTED_TOKENS = 10_000_000


@dataclass(frozen=True)
class AwdLstmPretrainConfig:
    """An AWD-LSTM, its batches and its schedule."""

    model: AwdLstmConfig = field(default_factory=AwdLstmConfig)
    """shape and dropout"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=500, compile=False, optimizer=OptimizerConfig(name="adamw", lr=0.003))
    )
    """length, optimizer and schedule"""
    seq_len: int = 70
    """tokens that a row goes on a step, and through which gradients flow"""
    sequences_per_step: int = 64
    """rows of an update; each carries its state to the next"""
    micro_batch_size: int = 32
    """rows a forward pass"""
    activation_penalty: float = 2.0
    """weight of the mean square of the last layer's outputs in the loss"""
    slowness_penalty: float = 1.0
    """weight of the mean square of their change from a position to the next"""
    heldout_tokens: int = 100_000
    """held-out tokens scored at the end, at most"""

    def __post_init__(self) -> None:
        for name in ("seq_len", "sequences_per_step", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("activation_penalty", "slowness_penalty", "heldout_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be 0 or more.")


def pretrain_awd_lstm(
    out: Path,
    shards: Sequence[Path],
    tokenizer_dir: Path,
    config: AwdLstmPretrainConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train an AWD-LSTM on shards and publish it as out/model; returns the finished run.

    Raises UserError when the shards were packed with another tokenizer.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    check_shards(shards, tokenizer, tokenizer_dir)

    def prepare(config: AwdLstmPretrainConfig) -> Job:
        if config.model.vocab_size < tokenizer.vocab_size:
            raise UserError(f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} entries.")
        model = AwdLstm(config.model).init_weights(torch.Generator().manual_seed(config.train.seed))
        with torch.no_grad():  # else an optimizer with steps of one size takes hundreds of updates to learn which tokens are common
            model.head_bias.copy_(log_frequencies(shards, config.model.vocab_size))
        text = ContiguousText(shards, config.sequences_per_step, config.seq_len, config.train.seed)
        carried = CarriedState(model.zero_state(config.sequences_per_step))
        return Job(
            model,
            awd_lstm_loss(carried, config.activation_penalty, config.slowness_penalty),
            lambda step: carried_batches(text, carried, step, config.micro_batch_size),
            steps=text.steps_a_pass,
            tokenizer=tokenizer,
            description="pretraining",
            data=text.fingerprint(),
            flops_per_token=config.model.train_flops_per_token,
            extra_state={"carried": carried},
            summarise=lambda summary: (
                summary
                | {"epochs": text.epochs(summary["steps"]), "num_params": sum(parameter.numel() for parameter in model.parameters())}
                | heldout_loss(model, shards, config.seq_len, config.heldout_tokens)
            ),
        )

    return run_job(out, "pretrain", config, prepare, parents=[*shards, tokenizer_dir], resume=resume, argv=argv, warn=warn)


def log_frequencies(shards: Sequence[Path], vocab_size: int) -> torch.Tensor:
    """Return each token's log-frequency in the first COUNTED_TOKENS of each folder, one added to each count, less their mean; fp32 (V,)."""
    counts = np.ones(vocab_size)
    for folder in shards:
        counts += np.bincount(open_split(folder).tokens[:COUNTED_TOKENS], minlength=vocab_size)
    logs = np.log(counts)
    return torch.from_numpy(logs - logs.mean()).float()


def carried_batches(text: ContiguousText, carried: CarriedState, step: int, micro_batch_size: int) -> list[tuple[torch.Tensor, ...]]:
    """Return a step's micro-batches, and let the carried state go on to it: inputs, targets, seeds of dropout, numbers of the rows."""
    rows = text.rows(step)
    carried.begin(step, rows.fresh_R)
    parts = [tensor.split(micro_batch_size) for tensor in (rows.inputs_RT, rows.targets_RT, torch.arange(text.num_rows))]
    return [
        (inputs, targets, step_seeds(text.seed, step, number, len(inputs)), numbers)
        for number, (inputs, targets, numbers) in enumerate(zip(*parts))
    ]


@torch.no_grad()
def heldout_loss(model: AwdLstm, shards: Sequence[Path], seq_len: int, max_tokens: int) -> dict[str, Any]:
    """Return the mean loss in nats a token of held-out text, read in long stretches with carried state, and how many tokens it is of.

    Nothing is returned where the shards hold no held-out text.
    """
    held = [folder for folder in shards if open_split(folder, "heldout").num_tokens]
    if not held or not max_tokens:
        return {}
    num_rows = max(HELDOUT_ROWS, len(held))
    text = ContiguousText(held, num_rows, seq_len, seed=0, split="heldout")
    state, total, count = model.zero_state(num_rows), 0.0, 0
    for step in range(min(text.steps_a_pass, max(1, max_tokens // (num_rows * seq_len)))):
        rows = text.rows(step)
        run = model.run(rows.inputs_RT, state)
        scores_NV = model.logits(run.hidden[-1].flatten(0, 1)).float()
        total += float(torch.nn.functional.cross_entropy(scores_NV, rows.targets_RT.flatten(), reduction="sum"))
        state, count = run.state, count + rows.targets_RT.numel()
    return {"heldout_loss_nats": total / count, "heldout_tokens": count}
