"""Training of encoder-decoders on parallel text: the Transformer of 2017 and T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plinth.config import UserError
from plinth.data.parallel import Pair
from plinth.models.encoder_decoder import EncoderDecoder
from plinth.models.encoder_decoder_config import EncoderDecoderConfig, train_flops_per_target_token
from plinth.recipes.translation_data import (
    PairsConfig,
    Tokenizers,
    TranslationData,
    find_tokenizers,
    keep_tokenizers,
    read_parallel,
)
from plinth.run import Run
from plinth.training.job import Job, run_job
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
    """Train an encoder-decoder on parallel files (source, target, ...) and publish it as out/model; returns the finished run.

    `tokenizers` are folders, one for both sides or one each; without, they are trained on the files and kept in the run. `held_out` are
    a source and a target file on which the summary has the loss. With `resume` the configuration saved in the run counts.
    """
    if not resume:
        Run(out).check_free()
    pairs, empty = read_parallel(files, config.data)
    held_pairs = read_parallel(held_out, config.data)[0] if held_out else []
    found = find_tokenizers(Path(out), pairs, config.data, tokenizers, resume)
    config = replace(config, model=fitted(config, found))
    if empty:
        warn(f"{empty} pairs have an empty side and are left out.")

    def prepare(config: TranslationConfig) -> Job:
        data = TranslationData.open(files, pairs, empty, found, config.data, config.train.seed)
        if data.text.num_too_long:
            warn(f"{data.text.num_too_long} pairs have more than {config.data.max_seq_len} tokens on a side and are left out.")
        return translation_job(config, data, held_pairs)

    stage = "pretrain-t5" if config.model.is_t5 else "pretrain-transformer"
    parents = [*files, *tokenizers, *held_out]
    return run_job(Path(out), stage, config, prepare, parents=parents, resume=resume, argv=argv, warn=warn)


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
    lengths = (float(data.text.sources.lengths.mean()), float(data.text.targets.lengths.mean()))

    def summarise(summary: dict[str, Any]) -> dict[str, Any]:
        found = data.counts(summary["steps"]) | {"num_params": sum(p.numel() for p in model.parameters())}
        return summary | found | (data.heldout(model, sequence_to_sequence_loss, held_pairs) if held_pairs else {})

    return Job(
        model,
        partial(sequence_to_sequence_loss, smoothing=config.label_smoothing),
        data.batches.at,
        steps=data.batches.steps_for(config.data.epochs),
        tokenizer=data.tokenizers.source,
        description="pretraining",
        data=data.fingerprint(),
        describe_batch=data.describe,
        flops_per_token=train_flops_per_target_token(config.model, *lengths),
        begin=lambda run, config: keep_tokenizers(run, data.tokenizers, config.data),
        publish=lambda folder: data.tokenizers.publish(model, folder),
        summarise=summarise,
    )
