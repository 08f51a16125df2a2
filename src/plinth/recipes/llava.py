"""A decoder taught to see: a projector between a vision tower and a decoder, first alone, then with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets
from plinth.data.image_questions import CAPTION_QUESTION, IMAGE, question_tokens, with_image_token
from plinth.data.images import ImageProcessor, PixelReader
from plinth.data.pictures import Picture, TextAndImageFiles, read_pictures
from plinth.data.rejects import row_counts
from plinth.models.dual_encoder import DualEncoder
from plinth.models.hub import load_decoder, load_model
from plinth.models.meta import on_meta
from plinth.models.transformer import Transformer
from plinth.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from plinth.posttraining.batches import describe_examples, pad_rows
from plinth.recipes.clip import pictures_sha256
from plinth.run import Run, find_model
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig

VOCAB_STEP = 64  # a vocabulary that grows becomes a multiple of it, which the kernels take
TRAINED = {  # which parts move
    "projector": ("projector.",),
    "decoder": ("projector.", "decoder."),
    "all": ("projector.", "decoder.", "vision."),
}


@dataclass(frozen=True)
class LlavaConfig:
    """What is trained of a vision tower, a projector and a decoder, on which batches."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(name="adamw", lr=0.002))
    )
    """length, optimizer and schedule"""
    trained: Literal["projector", "decoder", "all"] = "projector"
    """what moves: the projector alone (the first stage), with the decoder too (the second), or all parts"""
    vision_layer: int = -2
    """whose hidden states of the vision tower are projected: -2 is behind the last block but one"""
    epochs: float = 1.0
    """passes over the questions, where train.steps names no updates"""
    questions_per_step: int = 64
    """questions an update, each with its image"""
    micro_batch_size: int = 32
    """questions a forward pass"""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be positive.")
        if self.micro_batch_size < 1 or self.questions_per_step < 1:
            raise UserError("questions_per_step and micro_batch_size must be at least 1.")


def train_llava(
    out: Path,
    images: Path,
    config: LlavaConfig,
    *,
    start: Path | None = None,
    decoder: Path | None = None,
    vision: Path | None = None,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train on questions on images and publish the model as out/model; returns the finished run.

    It begins from an earlier run of this kind (`start`), or joins a decoder with the vision tower of a CLIP. A picture without questions
    is asked what it shows, its captions are the answers. Raises UserError for parts that do not fit.
    """
    parents = [path for path in (start, decoder, vision) if path is not None]
    if (start is None) == (decoder is None or vision is None) or len(parents) == 3:
        raise UserError("name either --start, an earlier run of --family llava, or both --decoder and --vision.")
    pictures, rejects = read_pictures(images)
    if rejects.count:
        warn(f"{images}: {rejects.describe()}")

    def prepare(config: LlavaConfig) -> Job:
        model, files = load_vision_language(start) if start else join_parts(decoder, vision, config)
        choose_trained(model, config.trained)
        return _job(model, ask_pictures(pictures, files.tokenizer, model.config), files, config, rejects.count, images)

    return run_job(out, "pretrain", config, prepare, parents=[*parents, images], resume=resume, argv=argv, warn=warn)


def _job(
    model: VisionLanguageModel,
    asked: Sequence[tuple[Path, Rendered]],
    files: TextAndImageFiles,
    config: LlavaConfig,
    rejected: int,
    source: Path,
) -> Job:
    lengths = [len(rendered.tokens) for _, rendered in asked]
    buckets = LengthBuckets(lengths, config.questions_per_step, config.micro_batch_size, config.train.seed)
    pixels, pad_id = PixelReader(files.processor), files.pad_id or 0

    def batches_at(step: int):
        return [
            (
                *pad_rows([asked[i][1].tokens for i in part], [asked[i][1].loss_mask for i in part], pad_id),
                pixels([asked[i][0] for i in part]),
            )
            for part in buckets.indices(step)
        ]

    return Job(
        model,
        causal_lm_loss,
        batches_at,
        steps=buckets.steps_for(config.epochs, None),
        tokenizer=files,
        description="teaching to see",
        data={"images_sha256": pictures_sha256(source), "tokenizer_sha256": files.tokenizer.sha256, "seed": config.train.seed},
        describe_batch=lambda step, rows: describe_examples(
            "image", np.concatenate(buckets.indices(step)).tolist(), rows, lambda i: str(asked[i][0])
        ),
        summarise=lambda summary: (
            summary
            | {
                "questions": len(asked),
                **row_counts(rejected),
                "epochs": summary["steps"] / buckets.steps_per_epoch,
                "num_params": sum(p.numel() for p in model.parameters()),
                "trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            }
        ),
    )


def choose_trained(model: VisionLanguageModel, trained: str) -> None:
    """Let the named parts move and hold the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[trained]))


def ask_pictures(pictures: Sequence[Picture], tokenizer: Tokenizer, config: VisionLanguageConfig) -> list[tuple[Path, Rendered]]:
    """Return each image with each of its questions and answers as tokens."""
    asked = []
    for picture in pictures:
        questions = picture.questions or tuple((CAPTION_QUESTION, caption) for caption in picture.captions)
        asked += [(picture.image, question_tokens(tokenizer, config, question, answer)) for question, answer in questions]
    return asked


def load_vision_language(path: Path) -> tuple[VisionLanguageModel, TextAndImageFiles]:
    """Read a run or model folder of a decoder that sees, with its tokenizer and its preparation of images."""
    folder = find_model(path)
    model = load_model(folder)
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f"{path} holds a {type(model).__name__}, not a decoder that sees. Name a run of --family llava.")
    processor = ImageProcessor.load(folder)
    processor.check_size(model.config.vision.image_size)
    return model, TextAndImageFiles(Tokenizer.load(folder), processor)


def join_parts(decoder: Path, vision: Path, config: LlavaConfig) -> tuple[VisionLanguageModel, TextAndImageFiles]:
    """Join a decoder with the vision tower of a CLIP, the projector drawn from the seed."""
    tower = load_model(find_model(vision))
    if not isinstance(tower, DualEncoder):
        raise UserError(f"{vision} holds a {type(tower).__name__}, not a CLIP. Name a run of --family clip, or an imported one.")
    folder = find_model(decoder)
    tokenizer = with_image_token(Tokenizer.load(folder))
    image_id = tokenizer.token_id(IMAGE)
    assert image_id is not None, "just added"
    grown = grow_vocabulary(load_decoder(folder), tokenizer.vocab_size)
    shape = VisionLanguageConfig(tower.config.vision, grown.config, image_id, vision_layer=config.vision_layer)
    model = on_meta(lambda: VisionLanguageModel(shape))
    model.projector.to_empty(device="cpu")
    model.vision, model.decoder = tower.vision, grown
    model.init_projector(torch.Generator().manual_seed(config.train.seed))
    return model, TextAndImageFiles(tokenizer, ImageProcessor.load(find_model(vision)))


@torch.no_grad()
def grow_vocabulary(decoder: Transformer, vocab_size: int) -> Transformer:
    """Return the decoder with room for `vocab_size` tokens: each new one embedded, and scored, as the mean of all."""
    old = decoder.config.vocab_size
    if vocab_size <= old:
        return decoder
    grown_size = -(-vocab_size // VOCAB_STEP) * VOCAB_STEP
    grown = on_meta(lambda: Transformer(replace(decoder.config, vocab_size=grown_size)))
    state = decoder.state_dict()
    for name in ("embed.weight", "head.weight"):
        if name in state:
            mean = state[name].mean(0, keepdim=True)
            state[name] = torch.cat((state[name], mean.expand(grown_size - old, -1)))
    grown.load_state_dict(state, assign=True)
    return grown
