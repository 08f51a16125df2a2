"""Finetuning of encoders: a pretrained encoder with a new head learns labels of texts, tags of words, or answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets
from plinth.data.features import Row, answer_rows, pad_rows, targets, text_rows, word_rows
from plinth.data.labelled import Task, label_names, read_examples
from plinth.data.rejects import row_counts
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.hub import load_model
from plinth.posttraining.batches import describe_examples
from plinth.run import Run, file_sha256, find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import EncoderTokens, encoder_tokens
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.objectives_encoder import classification_loss, span_loss, tagging_loss
from plinth.training.optim import OptimizerConfig

LOSSES = {"classify": classification_loss, "tag": tagging_loss, "answer": span_loss}


@dataclass(frozen=True)
class FinetuneConfig:
    """A task, its batches and its schedule."""

    task: Task = "classify"
    """classify: a label a text; tag: a label a word (named entities); answer: the stretch of a context that answers a question"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=10, decay_fraction=0.9, keep_pre_decay=False, compile=False,
            optimizer=OptimizerConfig(name="adamw", lr=0.0005, weight_decay=0.01),
        )
    )  # fmt: skip
    """optimizer and schedule; encoders as large as BERT-base want lr 0.00003 to 0.00005"""
    epochs: float = 3.0
    """passes over the examples"""
    examples_per_step: int = 32
    """rows an update"""
    micro_batch_size: int = 8
    """rows a forward pass"""
    max_seq_len: int | None = None
    """longest row in tokens (default: the model's); longer sentences are cut between words, longer contexts in windows"""
    truncate: bool = False
    """classify: cut longer texts at their end (default: they are an error)"""
    stride: int = 64
    """answer: tokens that neighbouring windows of a long context share"""
    fresh: bool = False
    """draw all weights anew instead of taking the pretrained ones, for comparison"""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be positive.")
        if self.examples_per_step < 1 or self.micro_batch_size < 1:
            raise UserError("examples_per_step and micro_batch_size must be at least 1.")


def finetune(
    out: Path,
    model_run: Path,
    data: Path,
    config: FinetuneConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Finetune a run's encoder on labelled examples and publish it as out/model; returns the finished run.

    The labels are those that the examples have. Rejected lines are counted in the summary and told through `warn`.
    Raises UserError for a model that is no encoder, and for examples that do not fit the task.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    examples, rejects = read_examples(data, config.task, labelled=True)
    if rejects.count:
        warn(f"{data}: {rejects.describe()}")

    def prepare(config: FinetuneConfig) -> Job:
        generator = torch.Generator().manual_seed(config.train.seed)
        model = with_new_head(load_model(source), config, label_names(examples, config.task), generator, str(model_run))
        rows = task_rows(examples, tokenizer, encoder_tokens(tokenizer), config, model.config)
        buckets = LengthBuckets([len(row.tokens) for row in rows], config.examples_per_step, config.micro_batch_size, config.train.seed)
        return Job(
            model,
            LOSSES[config.task],
            lambda step: [batch_of([rows[i] for i in part], config, model.config) for part in buckets.indices(step)],
            steps=buckets.steps_for(config.epochs, None),
            tokenizer=tokenizer,
            description="finetuning",
            data={"examples_sha256": file_sha256(data), "tokenizer_sha256": tokenizer.sha256, "seed": config.train.seed},
            describe_batch=lambda step, chosen: describe_examples(
                "row", np.concatenate(buckets.indices(step)).tolist(), chosen, lambda i: tokenizer.decode(rows[i].tokens[:40])
            ),
            summarise=lambda summary: summary | _summary(examples, rejects.count, rows, buckets, model.config, summary),
        )

    return run_job(out, "finetune", config, prepare, parents=[model_run, data], resume=resume, argv=argv, warn=warn)


def _summary(examples, rejected: int, rows: Sequence[Row], buckets: LengthBuckets, config: EncoderConfig, summary) -> dict[str, Any]:
    return {
        "task": config.head,
        "labels": list(config.labels),
        "examples": len(examples),
        **row_counts(rejected, cut=sum(row.is_cut for row in rows) if config.head == "classify" else None),
        "rows": len(rows),
        "epochs": summary["steps"] / buckets.steps_per_epoch,
    }


def with_new_head(
    model: torch.nn.Module, config: FinetuneConfig, labels: tuple[str, ...], generator: torch.Generator, where: str
) -> EncoderModel:
    """Return the encoder with a head for the task; a model that has that very head keeps it.

    Raises UserError when `model` is no encoder, or the examples have fewer than two labels.
    """
    if not isinstance(model, EncoderModel):
        raise UserError(f"{where} holds no encoder. Name a run of `plinth pretrain --family bert` or electra, or an imported one.")
    if config.task != "answer" and len(labels) < 2:
        raise UserError(f"the examples have the label {', '.join(labels)} alone. There must be two to tell apart.")
    shape = model.config.with_head(config.task, labels)
    new = EncoderModel(shape).init_weights(generator)
    if not config.fresh:
        kept = {name: tensor for name, tensor in model.state_dict().items() if model.config == shape or not name.startswith("head")}
        new.load_state_dict(kept, strict=False)
    return new


def task_rows(
    examples: Sequence[Any], tokenizer: Tokenizer, tokens: EncoderTokens, config: FinetuneConfig, shape: EncoderConfig
) -> list[Row]:
    """Return the examples as rows of tokens. Raises UserError for a text that is too long, unless it is to be cut."""
    longest = config.max_seq_len or shape.max_seq_len
    if not 4 <= longest <= shape.max_seq_len:
        raise UserError(f"max_seq_len={longest} must lie between 4 and the model's {shape.max_seq_len}.")
    numbers = {label: i for i, label in enumerate(shape.labels)}
    if config.task == "classify":
        return text_rows(examples, tokenizer, tokens, numbers, longest, config.truncate)
    if config.task == "tag":
        return word_rows(examples, tokenizer, tokens, numbers, longest)
    return answer_rows(examples, tokenizer, tokens, longest, config.stride)


def batch_of(rows: Sequence[Row], config: FinetuneConfig, shape: EncoderConfig) -> tuple[torch.Tensor, ...]:
    """Return a micro-batch: tokens, mask and segments, and what the loss compares with."""
    tokens, mask, segments = pad_rows(rows, shape.pad_id, config.max_seq_len or shape.max_seq_len)
    return tokens, mask, segments, targets(rows, config.task, tokens.shape[1])
