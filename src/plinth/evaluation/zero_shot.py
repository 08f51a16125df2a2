"""What two towers know without having been taught a task: classes by their names, and finding texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from plinth.config import UserError
from plinth.data.images import ImageProcessor
from plinth.data.pictures import Picture, caption_rows
from plinth.models.dual_encoder import DualEncoder
from plinth.models.hub import load_model
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer

BATCH = 64  # texts or images a forward pass
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")


@dataclass(frozen=True)
class ClassScore:
    """One class of one image."""

    name: str
    """the class"""
    probability: float
    """softmax over the classes that were asked for"""


class ImageTextModel:
    """Two towers with their tokenizer and their preparation of images."""

    def __init__(self, model: DualEncoder, tokenizer: Tokenizer, processor: ImageProcessor):
        processor.check_size(model.config.vision.image_size)
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor

    @classmethod
    def load(cls, path: Path) -> ImageTextModel:
        """Load a run or model folder. Raises UserError when it holds another kind of model."""
        folder = find_model(path)
        model = load_model(folder)
        if not isinstance(model, DualEncoder):
            raise UserError(f"{path} holds a {type(model).__name__}, not a text and a vision tower. Name one of --family clip.")
        return cls(model, Tokenizer.load(folder), ImageProcessor.load(folder))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return a vector of length 1 for each text, fp32 (N, P)."""
        parts = [list(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        return torch.cat([self.model.encode_text(caption_rows(self.tokenizer, self.model.config.text, part)) for part in parts])

    @torch.inference_mode()
    def images(self, images: Sequence[Path | np.ndarray]) -> torch.Tensor:
        """Return a vector of length 1 for each image, fp32 (N, P)."""
        parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        return torch.cat([self.model.encode_image(self.processor(part)) for part in parts])

    def class_vectors(self, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> torch.Tensor:
        """Return a vector of length 1 for each class: the mean over the templates, in whose {} its name stands; (classes, P).

        Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.4: an ensemble over embeddings, not over probabilities.
        """
        check_templates(templates)
        texts = [template.replace("{}", name) for name in classes for template in templates]
        return F.normalize(self.texts(texts).unflatten(0, (len(classes), len(templates))).mean(1), dim=-1)

    def probabilities(self, image_vectors_NP: torch.Tensor, class_vectors_KP: torch.Tensor) -> torch.Tensor:
        """Return the probability of each class for each image, fp32 (N, K)."""
        return (self.model.logit_scale.detach().float().exp() * image_vectors_NP @ class_vectors_KP.t()).softmax(-1)

    def classify(
        self, images: Sequence[Path | np.ndarray], classes: Sequence[str], templates: Sequence[str] = TEMPLATES, top: int = 5
    ) -> list[list[ClassScore]]:
        """Return the likeliest classes of each image, the likeliest first."""
        if len(classes) < 2:
            raise UserError(f"classes={list(classes)} leaves no choice. Name at least two.")
        probabilities = self.probabilities(self.images(images), self.class_vectors(classes, templates))
        best = probabilities.topk(min(top, len(classes)), dim=-1)
        return [[ClassScore(classes[i], p) for i, p in zip(*rows)] for rows in zip(best.indices.tolist(), best.values.tolist())]


def check_templates(templates: Sequence[str]) -> None:
    """Raise UserError for a template without a place for the name of the class."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template {template!r} has no {{}} for the name of the class. Write for instance 'a photo of a {{}}.'.")
    if not templates:
        raise UserError("templates is empty. Use '{}' for the bare names.")


def recall_at(similarity_QC: torch.Tensor, right_QC: torch.Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Return, for each k, the share of queries that have a right candidate among the k most similar.

    `right_QC` is true where a candidate belongs to a query; a query that none belongs to does not count. Of equal similarities the
    candidate that stands first counts as more similar.
    """
    order = similarity_QC.argsort(dim=1, descending=True, stable=True)
    hits_QC = right_QC.gather(1, order)[right_QC.any(1)]
    if not len(hits_QC):
        raise UserError("no query has a right candidate, so there is no recall to measure.")
    return {k: hits_QC[:, :k].any(1).double().mean().item() for k in ks}


@dataclass(frozen=True)
class Recalls:
    """How often the right one is among the k nearest."""

    text_to_image: dict[int, float]
    """for each k, the share of captions whose image, or one of whose images, is among the k most similar images"""
    image_to_text: dict[int, float]
    """for each k, the share of images one of whose captions is among the k most similar captions"""
    num_images: int
    """images searched"""
    num_captions: int
    """different captions searched"""


def measure_recall(model: ImageTextModel, pictures: Sequence[Picture], ks: Sequence[int] = (1, 5, 10)) -> Recalls:
    """Search every caption among all images and every image among all captions; equal captions count as one.

    Raises UserError when no picture has a caption.
    """
    captions = list(dict.fromkeys(caption for picture in pictures for caption in picture.captions))
    if not captions:
        raise UserError("no image has a caption, so there is nothing to search for.")
    number = {caption: i for i, caption in enumerate(captions)}
    right_NC = torch.zeros(len(pictures), len(captions), dtype=torch.bool)
    for i, picture in enumerate(pictures):
        right_NC[i, [number[caption] for caption in picture.captions]] = True
    similarity_NC = model.images([picture.image for picture in pictures]) @ model.texts(captions).t()
    return Recalls(recall_at(similarity_NC.t(), right_NC.t(), ks), recall_at(similarity_NC, right_NC, ks), len(pictures), len(captions))


def find_images(model: ImageTextModel, pictures: Sequence[Picture], text: str, count: int = 5) -> list[tuple[Path, float]]:
    """Return the images that are most similar to a text, with the cosine of the angle between the two, nearest first."""
    similarity_N = model.images([picture.image for picture in pictures]) @ model.texts([text])[0]
    best = similarity_N.topk(min(count, len(pictures)))
    return [(pictures[i].image, value) for i, value in zip(best.indices.tolist(), best.values.tolist())]
