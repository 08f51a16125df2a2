"""Images with what is said of them: a JSON Lines file, or a folder of image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plinth.config import UserError
from plinth.data.images import SUFFIXES, ImageProcessor
from plinth.data.rejects import Rejects
from plinth.models.dual_encoder import LEGACY_END, TextTowerConfig
from plinth.tokenizer.encode import Tokenizer

METADATA = "metadata.jsonl"
WAYS = (
    f"Name a JSON Lines file ({{'image': path, 'caption': text}} a line), or a folder that holds {METADATA}, image files each beside a "
    ".txt file of the same name, or a folder of image files for each class."
)


@dataclass(frozen=True)
class Picture:
    """An image and the texts that belong to it."""

    image: Path
    """the file"""
    captions: tuple[str, ...] = ()
    """texts that describe it, each as good as the others"""
    questions: tuple[tuple[str, str], ...] = ()
    """questions with their answers"""


def read_pictures(source: Path) -> tuple[list[Picture], Rejects]:
    """Read the images of a file or folder with their texts; lines that cannot be used are counted.

    Raises UserError when nothing is left, or when `source` is neither. The images themselves are opened when they are needed.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist. {WAYS}")
    rejects = Rejects()
    if source.is_file():
        pictures = _from_lines(source, rejects)
    elif (source / METADATA).is_file():
        pictures = _from_lines(source / METADATA, rejects)
    else:
        pictures = _from_folder(source)
    if not pictures:
        raise UserError(f"{source} holds no image with a text. {rejects.describe()} {WAYS}".replace("  ", " "))
    return pictures, rejects


def _from_folder(folder: Path) -> list[Picture]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    pictures = []
    for file in files:
        text = file.with_suffix(".txt")
        if text.is_file():
            captions = tuple(line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip())
        else:
            captions = (file.parent.name.replace("_", " "),) if file.parent != folder else ()
        pictures += [Picture(file, captions)] if captions else []
    return pictures


def _from_lines(file: Path, rejects: Rejects) -> list[Picture]:
    pictures = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            pictures.append(_picture(json.loads(line), file.parent))
        except json.JSONDecodeError:
            rejects.add(number, "not JSON")
        except ValueError as error:
            rejects.add(number, str(error))
    return pictures


def _picture(values: Any, folder: Path) -> Picture:
    """Return what a line says. Raises ValueError with the reason when it cannot be used."""
    if not isinstance(values, dict):
        raise ValueError("not an object")
    name = values.get("image", values.get("file_name"))
    if not isinstance(name, str):
        raise ValueError("no 'image' (or 'file_name')")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} does not exist")
    captions = values.get("captions", values.get("caption", values.get("text", ())))
    captions = (captions,) if isinstance(captions, str) else tuple(captions)
    questions = tuple((entry["question"], entry["answer"]) for entry in values.get("questions", ()) if {"question", "answer"} <= set(entry))
    if "question" in values and "answer" in values:
        questions += ((values["question"], values["answer"]),)
    texts = [*captions, *(text for pair in questions for text in pair)]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("no 'caption', and no 'question' with an 'answer', that is text")
    return Picture(folder / name, captions, questions)


@dataclass(frozen=True)
class TextAndImageFiles:
    """What a model folder needs to read texts and images: both are saved beside the weights."""

    tokenizer: Tokenizer
    """splits texts"""
    processor: ImageProcessor
    """prepares images"""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def start_id(self) -> int | None:
        return self.tokenizer.start_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.tokenizer.end_ids

    @property
    def pad_id(self) -> int | None:
        return self.tokenizer.pad_id

    def save(self, path: Path) -> None:
        """Write the tokenizer's files and preprocessor_config.json into a folder."""
        self.tokenizer.save(path)
        self.processor.save(Path(path))


def caption_rows(tokenizer: Tokenizer, config: TextTowerConfig, texts: Sequence[str]) -> torch.Tensor:
    """Return captions as a text tower takes them, int64 (B, T): begin, text, end, and ends behind it up to the longest.

    A caption that is too long loses its last tokens, but not its end.
    """
    # Configurations with the legacy end name a wrong begin too: both are the last two ids, in this order.
    legacy = config.end_id == LEGACY_END
    begin, end = (config.vocab_size - 2, config.vocab_size - 1) if legacy else (config.begin_id, config.end_id)
    rows = [[begin, *ids[: config.max_seq_len - 2], end] for ids in tokenizer.encode_batch(texts)]
    width = max(map(len, rows))
    return torch.tensor([row + [end] * (width - len(row)) for row in rows])
