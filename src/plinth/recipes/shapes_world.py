"""The shapes world as files: images with captions and questions, to train on and held out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plinth.config import UserError
from plinth.data.images import save_image
from plinth.data.pictures import METADATA
from plinth.tasks.shapes import TEMPLATES, Drawing, draw, split_drawings


def write_drawings(
    out: Path, drawings: Sequence[Drawing], images_each: int, seed: int, edge: int = 32, templates: Sequence[str] = TEMPLATES
) -> Path:
    """Write images_each PNG files a combination and their metadata (file, captions, questions with answers); returns the folder.

    Needs Pillow (the extra `images`).
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (drawing, _) in enumerate(itertools.product(drawings, range(images_each))):
        name = f"{number:05d}.png"
        save_image(draw(drawing, np.random.Generator(np.random.PCG64([seed, number])), edge), out / name)
        questions = [{"question": q, "answer": a} for phrasing in (0, 1) for q, a in drawing.questions(phrasing)]
        captions = [drawing.caption(template) for template in templates]
        lines.append({"file_name": name, "captions": captions, "questions": questions})
    (out / METADATA).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return out


def write_world(out: Path, images_each: int = 20, held_out: float = 0.2, seed: int = 0, edge: int = 32) -> dict[str, Path]:
    """Write out/train and out/held_out, whose combinations do not meet; returns the two folders by name.

    Raises UserError when the folder holds something already, or for a size that shows no shape.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty. Name a new folder.")
    if images_each < 1 or edge < 8:
        raise UserError(f"images_each={images_each} must be at least 1, and edge={edge} at least 8 pixels.")
    kept, unseen = split_drawings(held_out, seed)
    return {
        name: write_drawings(out / name, drawings, images_each, seed=2 * seed + i, edge=edge)
        for i, (name, drawings) in enumerate({"train": kept, "held_out": unseen}.items())
    }
