"""Training of recurrent sequence-to-sequence models on parallel text, with or without attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from plinth.config import UserError
from plinth.data.parallel import Pair
from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig
from plinth.recipes.translation_data import PairsConfig, TranslationData, find_tokenizers, keep_tokenizers, read_parallel
from plinth.run import Run
from plinth.training.job import Job, run_job
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
    """Train a recurrent model on parallel files (source, target, ...) and publish it as out/model; returns the finished run.

    `tokenizers` are folders, one for both sides or one each; without, they are trained on the files and kept in the run. `held_out` are
    a source and a target file on which the summary has the loss. With `resume` the configuration saved in the run counts.
    """
    if not resume:
        Run(out).check_free()
    pairs, empty = read_parallel(files, config.data)
    held_pairs = read_parallel(held_out, config.data)[0] if held_out else []
    found = find_tokenizers(Path(out), pairs, config.data, tokenizers, resume)
    sizes = {"source_vocab_size": found.source.vocab_size, "target_vocab_size": found.target.vocab_size}
    config = replace(config, model=replace(config.model, **sizes))
    if empty:
        warn(f"{empty} pairs have an empty side and are left out.")

    def prepare(config: RecurrentTranslationConfig) -> Job:
        data = TranslationData.open(files, pairs, empty, found, config.data, config.train.seed)
        if data.text.num_too_long:
            warn(f"{data.text.num_too_long} pairs have more than {config.data.max_seq_len} tokens on a side and are left out.")
        return recurrent_job(config, data, held_pairs)

    parents = [*files, *tokenizers, *held_out]
    return run_job(Path(out), f"pretrain-{config.model.cell}", config, prepare, parents=parents, resume=resume, argv=argv, warn=warn)


def recurrent_job(config: RecurrentTranslationConfig, data: TranslationData, held_pairs: Sequence[Pair]) -> Job:
    """Return what the loop needs; the head's bias starts at the target tokens' log-frequencies."""
    model = RecurrentSeq2Seq(config.model).init_weights(torch.Generator().manual_seed(config.train.seed))
    # Otherwise the hidden states learn first to push all tokens down that are never used, and Luong's tanh saturates on the way.
    model.head.bias.data.copy_(-torch.from_numpy(data.unigram_nats()))
    lengths = (float(data.text.sources.lengths.mean()), float(data.text.targets.lengths.mean()))

    def summarise(summary: dict[str, Any]) -> dict[str, Any]:
        found = data.counts(summary["steps"]) | {"num_params": sum(p.numel() for p in model.parameters())}
        return summary | found | (data.heldout(model, recurrent_seq2seq_loss(), held_pairs) if held_pairs else {})

    return Job(
        model,
        recurrent_seq2seq_loss(config.teacher_forcing),
        data.batches.at,
        steps=data.batches.steps_for(config.data.epochs),
        tokenizer=data.tokenizers.source,
        description="pretraining",
        data=data.fingerprint(),
        describe_batch=data.describe,
        flops_per_token=config.model.train_flops(*lengths) / lengths[1],
        begin=lambda run, config: keep_tokenizers(run, data.tokenizers, config.data),
        publish=lambda folder: data.tokenizers.publish(model, folder),
        summarise=summarise,
    )
