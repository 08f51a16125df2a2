"""Contrastive pretraining of a text tower and a vision tower on images with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets
from plinth.data.images import ImageProcessor, PixelReader
from plinth.data.pictures import Picture, TextAndImageFiles, caption_rows, read_pictures
from plinth.data.rejects import row_counts
from plinth.models.dual_encoder import DualEncoder, DualEncoderConfig
from plinth.models.hub import save_model
from plinth.posttraining.batches import describe_examples
from plinth.run import Run, file_sha256
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.objectives_contrastive import bound_logit_scale, contrastive_loss
from plinth.training.optim import OptimizerConfig


@dataclass(frozen=True)
class ClipConfig:
    """Two towers, their batches and their schedule."""

    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    """shape of the towers; the tokenizer decides text.vocab_size and the ids of begin and end"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(name="adamw", lr=0.001))
    )
    """length, optimizer and schedule"""
    epochs: float = 10.0
    """passes over the images, where train.steps names no updates"""
    pairs_per_step: int = 128
    """images with a caption each an update"""
    micro_batch_size: int = 64
    """pairs that are told from each other, a forward pass; more make the task harder and the model better"""
    tokenizer_size: int = 1024
    """entries of the tokenizer that is trained on the captions when none is named"""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 2 or self.pairs_per_step < self.micro_batch_size:
            raise UserError(
                f"micro_batch_size={self.micro_batch_size} must be at least 2, as pairs are told from each other, and at most "
                f"pairs_per_step={self.pairs_per_step}."
            )
        if self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be positive.")


def pretrain_clip(
    out: Path,
    images: Path,
    config: ClipConfig,
    *,
    tokenizer_dir: Path | None = None,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train two towers on images with captions and publish them as out/model; returns the finished run.

    A step depends on nothing but its number: which images it takes, and which of an image's captions. Lines of `images` that cannot be
    used are told through `warn` and counted in the summary.
    """
    pictures, rejects = read_pictures(images)
    pictures = [picture for picture in pictures if picture.captions]
    if len(pictures) < 2:
        raise UserError(f"{images} holds {len(pictures)} image(s) with a caption; a contrast needs at least 2.")
    if rejects.count:
        warn(f"{images}: {rejects.describe()}")
    files = TextAndImageFiles(
        clip_tokenizer(tokenizer_dir, pictures, config.tokenizer_size), ImageProcessor.for_size(config.model.vision.image_size)
    )

    def prepare(config: ClipConfig) -> Job:
        model = DualEncoder(config.model).init_weights(torch.Generator().manual_seed(config.train.seed))
        return _job(model, pictures, files, config, rejects.count, images)

    parents = [images, *([] if tokenizer_dir is None else [tokenizer_dir])]
    config = replace(config, model=fit_to_tokenizer(config.model, files.tokenizer))
    return run_job(out, "pretrain", config, prepare, parents=parents, resume=resume, argv=argv, warn=warn)


def _job(model: DualEncoder, pictures: Sequence[Picture], files: TextAndImageFiles, config: ClipConfig, rejected: int, source: Path) -> Job:
    buckets = LengthBuckets([1] * len(pictures), config.pairs_per_step, config.micro_batch_size, config.train.seed)
    pixels = PixelReader(files.processor)

    def batches_at(step: int):
        rng = np.random.Generator(np.random.PCG64([config.train.seed, 2, step]))
        batches = []
        for part in buckets.indices(step):
            texts = [pictures[i].captions[rng.integers(len(pictures[i].captions))] for i in part]
            rows = caption_rows(files.tokenizer, config.model.text, texts)
            batches.append((rows, pixels([pictures[i].image for i in part])))
        return batches

    def publish(folder: Path) -> None:
        bound_logit_scale(model)
        save_model(model, files, folder)

    return Job(
        model,
        contrastive_loss,
        batches_at,
        steps=buckets.steps_for(config.epochs, None),
        tokenizer=files,
        description="pretraining",
        data={"images_sha256": pictures_sha256(source), "tokenizer_sha256": files.tokenizer.sha256, "seed": config.train.seed},
        describe_batch=lambda step, rows: describe_examples(
            "image", np.concatenate(buckets.indices(step)).tolist(), rows, lambda i: str(pictures[i].image)
        ),
        publish=publish,
        summarise=lambda summary: (
            summary
            | {
                "images": len(pictures),
                **row_counts(rejected),
                "epochs": summary["steps"] / buckets.steps_per_epoch,
                "num_params": sum(p.numel() for p in model.parameters()),
            }
        ),
    )


def clip_tokenizer(folder: Path | None, pictures: Sequence[Picture], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a folder, or one trained on the captions: the same captions give the same tokenizer."""
    if folder is not None:
        return Tokenizer.load(folder)
    return train_tokenizer([caption for picture in pictures for caption in picture.captions], vocab_size)


def fit_to_tokenizer(config: DualEncoderConfig, tokenizer: Tokenizer) -> DualEncoderConfig:
    """Return the shape with the tokenizer's vocabulary, and its <|endoftext|> and <|end|> around a caption.

    Raises UserError for a tokenizer without them.
    """
    begin, end = tokenizer.end_of_text_id, tokenizer.end_id
    if begin is None or end is None:
        raise UserError("this tokenizer has no <|endoftext|> and <|end|> to stand around a caption. Use one that Plinth trained.")
    return replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size, begin_id=begin, end_id=end))


def pictures_sha256(source: Path) -> str:
    """Return what identifies the texts and their images by name; the images' own bytes are not read for it."""
    if source.is_file():
        return file_sha256(source)
    import hashlib

    names = sorted(f"{file.relative_to(source)} {file.stat().st_size}" for file in source.rglob("*") if file.is_file())
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
