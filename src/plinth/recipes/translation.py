"""Training of encoder-decoders on parallel text: the Transformer of 2017 and T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from plinth.config import UserError
from plinth.data.parallel import Pair
from plinth.models.encoder_decoder import EncoderDecoder
from plinth.models.encoder_decoder_config import EncoderDecoderConfig, train_flops_per_target_token
from plinth.recipes.translation_data import PairsConfig, Tokenizers, TranslationData
from plinth.recipes.translation_training import mean_lengths, pairs_job, train_on_pairs
from plinth.run import Run
from plinth.training.job import Job
from plinth.training.loop import TrainConfig
from plinth.training.objectives_seq2seq import sequence_to_sequence_loss
from plinth.training.optim import OptimizerConfig


def translation_train_config() -> TrainConfig:
    return TrainConfig(warmup_steps=100, compile=False, optimizer=OptimizerConfig(lr=0.002, muon_lr=0.01))


@dataclass(frozen=True)
class TranslationConfig:
    """An encoder-decoder, its parallel text and its schedule."""

    model: EncoderDecoderConfig = field(default_factory=EncoderDecoderConfig)
    """shape; vocabularies and special ids follow the tokenizers"""
    train: TrainConfig = field(default_factory=translation_train_config)
    """length, optimizer and schedule; not compiled on a GPU, as batches have many shapes"""
    data: PairsConfig = field(default_factory=PairsConfig)
    """pairs of an update, and how they become tokens"""
    label_smoothing: float = 0.1
    """share of each target that is spread over all tokens"""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} must be 0 or more and less than 1.")
        if self.data.max_seq_len > self.model.max_seq_len:
            raise UserError(
                f"data.max_seq_len={self.data.max_seq_len} exceeds model.max_seq_len={self.model.max_seq_len}. Raise the model's."
            )


def pretrain_translation(
    out: Path,
    files: Sequence[Path],
    config: TranslationConfig,
    *,
    tokenizers: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train an encoder-decoder on parallel files (source, target, ...) and publish it as out/model; see `train_on_pairs`."""
    return train_on_pairs(
        out, files, config, stage="pretrain-t5" if config.model.is_t5 else "pretrain-transformer", fit=fitted, job=translation_job,
        tokenizers=tokenizers, held_out=held_out, resume=resume, argv=argv, warn=warn,
    )  # fmt: skip


def fitted(config: TranslationConfig, tokenizers: Tokenizers) -> EncoderDecoderConfig:
    """Return the model's shape with the tokenizers' vocabularies and special ids."""
    marks, target = tokenizers.marks, None if tokenizers.shared else tokenizers.target.vocab_size
    if target is not None and config.model.is_t5:
        raise UserError("T5 has one vocabulary for source and target. Leave --data.no-shared-vocabulary out, or name one tokenizer.")
    return replace(
        config.model,
        vocab_size=tokenizers.source.vocab_size,
        target_vocab_size=target,
        pad_id=marks.pad_id,
        start_id=marks.start_id,
        end_id=marks.end_id,
    )


def translation_job(config: TranslationConfig, data: TranslationData, held_pairs: Sequence[Pair]) -> Job:
    """Return what the loop needs."""
    model = EncoderDecoder(config.model).init_weights(torch.Generator().manual_seed(config.train.seed))
    return pairs_job(
        model, partial(sequence_to_sequence_loss, smoothing=config.label_smoothing), data, held_pairs, config.data.epochs,
        heldout_loss=sequence_to_sequence_loss, flops_per_token=train_flops_per_target_token(config.model, *mean_lengths(data)),
    )  # fmt: skip
