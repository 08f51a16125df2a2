"""`plinth image shapes`: drawn images with captions and questions, to try the models of images on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.recipes.shapes_world import write_world


@dataclass(frozen=True)
class Options:
    """Draw images of coloured shapes with captions and questions; a share of the combinations is kept apart."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder to write: train and held_out in it"""
    images_each: int = 20
    """images a combination of colour, shape, size and place"""
    held_out: float = 0.2
    """share of the 192 combinations that no training image shows"""
    edge: int = 32
    """edge of an image in pixels"""
    seed: int = 0
    """of the drawing, and of what is held out"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when the folder holds something already."""
    options = read_options(Options, args=argv, prog="plinth image shapes")
    folders = write_world(options.out, options.images_each, options.held_out, options.seed, options.edge)
    counts = {name: sum(1 for _ in folder.glob("*.png")) for name, folder in folders.items()}
    answer = {"path": str(options.out), "images": counts}

    def render(console) -> None:
        console.print(
            f"{options.out}: {counts['train']:,} images to train on, {counts['held_out']:,} of combinations held out. "
            f"Next: plinth pretrain --family clip --images {folders['train']} --out runs/clip",
            markup=False,
        )

    emit(answer, options.json, render)
    return 0
