"""Pretraining of encoders on token shards: BERT on hidden tokens, ELECTRA on replaced ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.masking import MaskingConfig
from plinth.data.shards import read_manifest
from plinth.models.electra import Electra
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig, train_flops_per_token
from plinth.models.hub import save_model
from plinth.recipes.encoder_rows import EncoderRows, RowConfig
from plinth.recipes.pretraining import check_shards
from plinth.run import Run
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import encoder_tokens, with_encoder_tokens
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.objectives_encoder import RtdTokens, masked_lm_loss, masked_lm_terms, replaced_token_loss
from plinth.training.optim import OptimizerConfig

HELDOUT_STEPS = 4  # steps of held-out rows that the loss at the end is taken on
HELDOUT_SEED = 0x5EED


def encoder_train_config() -> TrainConfig:
    return TrainConfig(steps=500, warmup_steps=40, optimizer=OptimizerConfig(lr=0.004, muon_lr=0.02))


@dataclass(frozen=True)
class BertConfig:
    """An encoder that learns hidden tokens, its rows and its schedule."""

    model: EncoderConfig = field(default_factory=EncoderConfig)
    """shape of the encoder"""
    train: TrainConfig = field(default_factory=encoder_train_config)
    """length, optimizer and schedule"""
    data: RowConfig = field(default_factory=RowConfig)
    """rows of a step"""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    """which tokens are hidden"""

    def __post_init__(self) -> None:
        if self.data.seq_len > self.model.max_seq_len:
            raise UserError(f"seq_len={self.data.seq_len} exceeds max_seq_len={self.model.max_seq_len}. Lower it, or raise the model's.")


@dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """An encoder that learns which tokens a small generator replaced, its rows and its schedule."""

    masking: MaskingConfig = field(default_factory=lambda: MaskingConfig(masked=1.0, random=0.0))
    """which tokens the generator has to guess"""
    generator_share: float = 0.25
    """width of the generator as a share of the discriminator's"""
    rtd_weight: float = 50.0
    """factor on the discriminator's loss"""
    rtd_tokens: RtdTokens = "all"
    """positions that the discriminator learns from: all, or only the hidden ones (masked), for comparison"""


def pretrain_encoder(
    out: Path,
    shards: Sequence[Path],
    tokenizer_dir: Path,
    config: BertConfig | ElectraConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train BERT, or with an ElectraConfig ELECTRA, and publish it as out/model; returns the finished run.

    The published tokenizer is the one of the shards with [CLS], [SEP] and [MASK] where it lacks them, and the vocabulary is as large.
    ELECTRA's out/model is the discriminator, and out/generator fills masks. The summary has the loss on held-out hidden tokens beside
    what they cost by their frequency alone.
    Raises UserError when the shards were packed with another tokenizer, or are others than the run began with.
    """
    packed = Tokenizer.load(tokenizer_dir)
    check_shards(shards, packed, tokenizer_dir)
    tokenizer = with_encoder_tokens(packed)
    config = replace(config, model=fitted(config, tokenizer))
    stage = "pretrain-electra" if isinstance(config, ElectraConfig) else "pretrain-bert"

    def prepare(config: BertConfig) -> Job:
        return encoder_job(config, shards, tokenizer)

    return run_job(out, stage, config, prepare, parents=[*shards, tokenizer_dir], resume=resume, argv=argv, warn=warn)


def fitted(config: BertConfig, tokenizer: Tokenizer) -> EncoderConfig:
    """Return the model's shape with the tokenizer's vocabulary and padding, and the head of its family.

    Raises UserError for a vocabulary that is too small, and for a field that is decided here and was given another value.
    """
    model, is_electra = config.model, isinstance(config, ElectraConfig)
    size = tokenizer.vocab_size if model.vocab_size == EncoderConfig.vocab_size else model.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={size} is below the tokenizer's {tokenizer.vocab_size} entries. Leave it out.")
    shape = replace(model, vocab_size=size, pad_id=encoder_tokens(tokenizer).pad, published_as="electra" if is_electra else "bert")
    shape = shape.with_head("rtd" if is_electra else "mlm")
    for name in ("head", "labels", "published_as", "pooler", "pad_id"):
        if getattr(model, name) not in (getattr(EncoderConfig, name), getattr(shape, name)):
            raise UserError(f"model.{name}={getattr(model, name)!r} is decided by the family and the tokenizer. Leave it out.")
    return shape


def encoder_job(config: BertConfig, shards: Sequence[Path], tokenizer: Tokenizer) -> Job:
    """Return what the loop needs."""
    rows = open_rows(config, shards, tokenizer, "train")
    generator = torch.Generator().manual_seed(config.train.seed)
    more: dict[str, Any] = {}
    model: EncoderModel | Electra
    if isinstance(config, ElectraConfig):
        model = Electra(config.model, config.generator_share).init_weights(generator)
        loss = replaced_token_loss(config.masking.share, config.rtd_weight, config.rtd_tokens)
        more["publish"] = lambda folder: publish_electra(model, tokenizer, folder)
    else:
        model, loss = EncoderModel(config.model).init_weights(generator), masked_lm_loss
    guesses = isinstance(config, ElectraConfig)
    return Job(
        model,
        loss,
        lambda step: rows.batches(step, guesses),
        steps=rows.steps_per_epoch,
        tokenizer=tokenizer,
        description="pretraining",
        data=rows.fingerprint(),
        describe_batch=lambda step, chosen=None: rows.describe(step, chosen, tokenizer.decode),
        flops_per_token=flops_per_counted_token(config),
        summarise=lambda summary: summary | finish(model, config, shards, tokenizer, rows, summary),
        **more,
    )


def open_rows(config: BertConfig, shards: Sequence[Path], tokenizer: Tokenizer, split: str) -> EncoderRows:
    """Return the rows of a split; those held out are drawn with a seed of their own, the same for every run."""
    tokens = encoder_tokens(tokenizer)
    ordinary = np.array([i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids])
    seed = config.train.seed if split == "train" else HELDOUT_SEED
    return EncoderRows(shards, split, config.data, config.masking, tokens, ordinary, seed)


def publish_electra(model: Electra, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the discriminator into the run's model folder and the generator beside it."""
    save_model(model.generator, tokenizer, folder.parent / "generator")
    save_model(model.discriminator, tokenizer, folder)


def flops_per_counted_token(config: BertConfig) -> float:
    """Return the operations of a training step a token that the loss counts: a hidden one in BERT, any in ELECTRA."""
    share, seq_len = config.masking.share, config.data.seq_len
    if isinstance(config, ElectraConfig):
        parts = Electra.shapes(config.model, config.generator_share)
        return train_flops_per_token(parts[0], seq_len) + train_flops_per_token(parts[1], seq_len, share)
    return train_flops_per_token(config.model, seq_len, share) / share


def finish(model: Any, config: BertConfig, shards: Sequence[Path], tokenizer: Tokenizer, rows: EncoderRows, summary) -> dict[str, Any]:
    """Return what the run's summary says beside the loop's: size, epochs, and the loss on held-out text."""
    found = {"num_params": sum(p.numel() for p in model.parameters()), "epochs": summary["steps"] / rows.steps_per_epoch}
    if all(read_manifest(folder)["documents_heldout"] for folder in shards):
        filler = model.generator if isinstance(model, Electra) else model
        found |= heldout_loss(filler, open_rows(config, shards, tokenizer, "heldout"), rows.unigram_nats())
    return found


@torch.no_grad()
def heldout_loss(model: EncoderModel, rows: EncoderRows, unigram_nats: np.ndarray) -> dict[str, float]:
    """Return the mean loss in nats, and the accuracy, on hidden tokens of held-out rows, beside the loss that frequencies alone give."""
    loss, right, count, trivial = 0.0, 0, 0, 0.0
    for step in range(min(HELDOUT_STEPS, rows.steps_per_epoch)):
        for inputs, targets, mask in rows.batches(step):
            batch_loss, scores, chosen, _ = masked_lm_terms(model, inputs, targets, mask)
            loss, count = loss + float(batch_loss), count + len(chosen)
            right += int((scores.argmax(-1) == chosen).sum())
            trivial += float(unigram_nats[chosen.numpy()].sum())
    if not count:
        return {}
    return {
        "heldout_nats": loss / count,
        "heldout_accuracy": right / count,
        "heldout_unigram_nats": trivial / count,
        "heldout_tokens": count,
    }
