"""`plinth pretrain --family llava`: a decoder taught to see, from questions on images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.recipes.llava import LlavaConfig, train_llava


@dataclass(frozen=True)
class Options:
    """Teach a decoder to see: a projector between a vision tower and a decoder, first alone (--trained projector), then with them."""

    images: Path
    """JSON Lines ({"image", "question", "answer"} or {"image", "caption"} a line), or a folder with metadata.jsonl"""
    out: Path
    """run directory to write"""
    decoder: Path | None = None
    """run, build or model folder of the decoder to begin with"""
    vision: Path | None = None
    """run of --family clip, or an imported one, whose vision tower to begin with"""
    start: Path | None = None
    """run of --family llava to go on from, in the place of --decoder and --vision"""
    config: Annotated[LlavaConfig, tyro.conf.arg(name="")] = field(default_factory=LlavaConfig)
    """what is trained, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth pretrain --family llava", args=argv)
    run = train_llava(
        options.out, options.images, options.config, start=options.start, decoder=options.decoder, vision=options.vision,
        resume=options.resume, argv=argv, warn=say,
    )  # fmt: skip
    summary = {"path": str(run.path), "model": str(run.model_dir), **(run.summary or {})}

    def render(console) -> None:
        console.print(
            f"{run.path}: {summary['steps']:,} steps in {summary['time_s']:.0f} s, loss {summary['loss_nats']:.3f} nats a token of the "
            f"answers. Next: plinth image ask {run.path} PICTURE 'What does the image show?'",
            markup=False,
        )

    emit(summary, options.json, render)
    return 0
