"""`plinth pretrain --family clip`: a text tower and a vision tower from images with captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.recipes.clip import ClipConfig, pretrain_clip


@dataclass(frozen=True)
class Options:
    """Pretrain a text tower and a vision tower (CLIP) so that an image and its caption get like vectors."""

    images: Path
    """JSON Lines ({"image", "caption"} a line), or a folder: with metadata.jsonl, with a .txt beside each image, or a folder a class"""
    out: Path
    """run directory to write"""
    tokenizer: Path | None = None
    """tokenizer folder (default: one is trained on the captions)"""
    config: Annotated[ClipConfig, tyro.conf.arg(name="")] = field(default_factory=ClipConfig)
    """model, batches and schedule"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth pretrain --family clip", args=argv)
    run = pretrain_clip(
        options.out, options.images, options.config, tokenizer_dir=options.tokenizer, resume=options.resume, argv=argv, warn=say
    )
    summary = {"path": str(run.path), "model": str(run.model_dir), **(run.summary or {})}

    def render(console) -> None:
        console.print(
            f"{run.path}: {summary['steps']:,} steps in {summary['time_s']:.0f} s, contrastive loss {summary['loss_nats']:.3f}. "
            f"Next: plinth image classify {run.path} PICTURE --classes cat dog",
            markup=False,
        )

    emit(summary, options.json, render)
    return 0
