"""`plinth image classify`: images sorted into classes that are only named."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.evaluation.zero_shot import TEMPLATES, ImageTextModel


@dataclass(frozen=True)
class Options:
    """Say which of some classes each image shows, by their names alone, with the text and vision towers of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """run of --family clip, or model folder"""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """image files"""
    classes: tuple[str, ...]
    """names of the classes, two or more"""
    templates: tuple[str, ...] = TEMPLATES
    """sentences in whose {} a name stands; a class is the mean of its sentences"""
    top: int = 5
    """classes shown an image, the likeliest first"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0."""
    options = read_options(Options, args=argv, prog="plinth image classify")
    model = ImageTextModel.load(options.run)
    scores = model.classify(options.images, options.classes, options.templates, options.top)
    answer = {"images": [{"image": str(image), "classes": list(map(asdict, row))} for image, row in zip(options.images, scores)]}

    def render(console) -> None:
        for image, row in zip(options.images, scores):
            console.print(f"{image}: " + ", ".join(f"{score.name} {score.probability:.1%}" for score in row), markup=False, highlight=False)

    emit(answer, options.json, render)
    return 0
