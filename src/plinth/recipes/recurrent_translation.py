"""Training of recurrent sequence-to-sequence models on parallel text, with or without attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from plinth.config import UserError
from plinth.data.parallel import Pair
from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig
from plinth.recipes.translation_data import PairsConfig, Tokenizers, TranslationData
from plinth.recipes.translation_training import mean_lengths, pairs_job, train_on_pairs
from plinth.run import Run
from plinth.training.job import Job
from plinth.training.loop import TrainConfig
from plinth.training.objectives_recurrent import recurrent_seq2seq_loss
from plinth.training.optim import OptimizerConfig


@dataclass(frozen=True)
class RecurrentTranslationConfig:
    """A recurrent encoder and decoder, their parallel text and their schedule."""

    model: RecurrentSeq2SeqConfig = field(default_factory=RecurrentSeq2SeqConfig)
    """shape and attention; vocabularies follow the tokenizers"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(warmup_steps=50, compile=False, optimizer=OptimizerConfig(name="adamw", lr=0.002))
    )
    """length, optimizer and schedule; not compiled on a GPU, as batches have many shapes"""
    data: PairsConfig = field(default_factory=PairsConfig)
    """pairs of an update, and how they become tokens"""
    teacher_forcing: float = 1.0
    """probability, place by place, that the decoder reads the target's token in training and not its own guess, 0 to 1; slower below 1"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.teacher_forcing <= 1.0:
            raise UserError(f"teacher_forcing={self.teacher_forcing} must lie between 0 and 1.")


def pretrain_recurrent(
    out: Path,
    files: Sequence[Path],
    config: RecurrentTranslationConfig,
    *,
    tokenizers: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train a recurrent model on parallel files (source, target, ...) and publish it as out/model; see `train_on_pairs`."""
    return train_on_pairs(
        out, files, config, stage=f"pretrain-{config.model.cell}", fit=fitted, job=recurrent_job,
        tokenizers=tokenizers, held_out=held_out, resume=resume, argv=argv, warn=warn,
    )  # fmt: skip


def fitted(config: RecurrentTranslationConfig, tokenizers: Tokenizers) -> RecurrentSeq2SeqConfig:
    """Return the model's shape with the tokenizers' vocabularies."""
    sizes = {"source_vocab_size": tokenizers.source.vocab_size, "target_vocab_size": tokenizers.target.vocab_size}
    return replace(config.model, **sizes)


def recurrent_job(config: RecurrentTranslationConfig, data: TranslationData, held_pairs: Sequence[Pair]) -> Job:
    """Return what the loop needs; the head's bias starts at the target tokens' log-frequencies."""
    model = RecurrentSeq2Seq(config.model).init_weights(torch.Generator().manual_seed(config.train.seed))
    # Otherwise the hidden states learn first to push all tokens down that are never used, and Luong's tanh saturates on the way.
    model.head.bias.data.copy_(-torch.from_numpy(data.unigram_nats()))
    lengths = mean_lengths(data)
    return pairs_job(
        model, recurrent_seq2seq_loss(config.teacher_forcing), data, held_pairs, config.data.epochs,
        heldout_loss=recurrent_seq2seq_loss(), flops_per_token=config.model.train_flops(*lengths) / lengths[1],
    )  # fmt: skip
