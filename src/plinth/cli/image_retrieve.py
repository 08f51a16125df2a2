"""`plinth image retrieve`: the images nearest to a text, or how well captions find their images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.data.pictures import read_pictures
from plinth.data.rejects import row_counts
from plinth.evaluation.zero_shot import ImageTextModel, find_images, measure_recall


@dataclass(frozen=True)
class Options:
    """Find the images nearest to a text; without a text, measure how often captions find their images, and images their captions."""

    run: Annotated[Path, tyro.conf.Positional]
    """run of --family clip, or model folder"""
    images: Path
    """JSON Lines ({"image", "caption"} a line), or a folder: with metadata.jsonl, with a .txt beside each image, or a folder a class"""
    text: str | None = None
    """what to look for (default: every caption, and every image)"""
    k: tuple[int, ...] = (1, 5, 10)
    """how many of the nearest count as found; with --text the largest is how many are shown"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0."""
    options = read_options(Options, args=argv, prog="plinth image retrieve")
    pictures, rejects = read_pictures(options.images)
    if rejects.count:
        say(f"{options.images}: {rejects.describe()}")
    model = ImageTextModel.load(options.run)
    if options.text is not None:
        found = find_images(model, pictures, options.text, max(options.k))
        lines = [f"{similarity:.3f}  {image}" for image, similarity in found]
        answer = {"text": options.text, "images": [{"image": str(image), "similarity": value} for image, value in found]}
    else:
        recalls = measure_recall(model, pictures, options.k)
        lines = [f"{recalls.num_images} images, {recalls.num_captions} different captions"]
        for name, shares in (
            ("captions find their image", recalls.text_to_image),
            ("images find a caption of theirs", recalls.image_to_text),
        ):
            lines.append(f"{name}: " + ", ".join(f"among the first {k} {share:.1%}" for k, share in shares.items()))
        answer = asdict(recalls)

    def render(console) -> None:
        for line in lines:
            console.print(line, markup=False, highlight=False)

    emit(answer | row_counts(rejects.count), options.json, render)
    return 0
