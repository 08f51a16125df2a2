"""Supervised finetuning: next-token cross-entropy on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from plinth.config import UserError, from_dict, to_dict
from plinth.models.hub import load_model, save_model
from plinth.posttraining.batches import LengthBuckets, pad_rows
from plinth.run import Run, find_model
from plinth.tokenizer.chat import Message, Rendered, read_messages, render
from plinth.tokenizer.encode import Tokenizer
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig


@dataclass(frozen=True)
class SftConfig:
    """Batches and schedule of supervised finetuning."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(warmup_steps=10, optimizer=OptimizerConfig(lr=0.002, muon_lr=0.01)))
    """optimizer and schedule"""
    epochs: float = 3.0
    """passes over the conversations"""
    tokens: int | None = None
    """tokens to process, padding included; given, it takes the place of epochs"""
    conversations_per_step: int = 128
    """conversations an update"""
    micro_batch_size: int = 64
    """conversations a forward pass"""
    max_seq_len: int | None = None
    """longest conversation in tokens (default: the model's context); a longer one is an error, never cut"""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be positive.")


def train_sft(
    out: Path,
    model_run: Path,
    messages: Path,
    config: SftConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Finetune a run's model on conversations ({"messages": [...]} a line) and publish it as out/model.

    Rejected lines are counted in the run's summary and told through `warn`.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    conversations, rejects = read_messages(messages)
    if rejects.count:
        warn(f"{messages}: {rejects.describe()}")
    if resume:
        run = Run.open(out)
        if run.is_done:
            return run
        config = from_dict(SftConfig, run.config, f"{out}/config.json: ")
    model = load_model(source)
    limit = config.max_seq_len or model.config.max_seq_len
    examples = render_examples(tokenizer, conversations, limit)
    lengths = [len(example.tokens) for example in examples]
    buckets = LengthBuckets(lengths, config.conversations_per_step, config.micro_batch_size, config.train.seed)
    if not resume:
        config = replace(config, train=config.train.resolved(buckets.steps_for(config.epochs, config.tokens)))
        run = Run.create(out, "sft", to_dict(config), [model_run, messages], argv, config.train.seed)
    pad_id = tokenizer.pad_id or 0

    def batches_at(step: int):
        return [
            pad_rows([examples[i].tokens for i in part], [examples[i].loss_mask for i in part], pad_id) for part in buckets.indices(step)
        ]

    summary = train(
        run,
        model,
        causal_lm_loss,
        batches_at,
        config.train,
        description="finetuning",
        resume=resume,
        warn=warn,
    )
    save_model(model, tokenizer, run.model_dir)
    supervised = sum(sum(example.loss_mask) for example in examples)
    summary |= {
        "conversations": len(conversations),
        "rejected": rejects.count,
        "epochs": summary["steps"] / buckets.steps_per_epoch,
        "supervised_share": supervised / sum(lengths),
    }
    run.finish(summary)
    return run


def render_examples(tokenizer: Tokenizer, conversations: list[list[Message]], max_seq_len: int) -> list[Rendered]:
    """Render conversations to tokens and masks.

    Raises UserError for one that is longer than `max_seq_len` tokens or has no supervised token.
    """
    examples = []
    for number, messages in enumerate(conversations, start=1):
        rendered = render(tokenizer, messages)
        if len(rendered.tokens) > max_seq_len + 1:
            raise UserError(
                f"conversation {number} has {len(rendered.tokens)} tokens, more than max_seq_len={max_seq_len}. "
                "Shorten it, or take a model with a longer context."
            )
        if not any(rendered.loss_mask):
            raise UserError(f"conversation {number} has no supervised token: no text of the assistant.")
        examples.append(rendered)
    return examples
