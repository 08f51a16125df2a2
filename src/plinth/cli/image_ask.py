"""`plinth image ask`: a question on an image, answered by a decoder that sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.inference.sampling_params import SamplingParams
from plinth.recipes.asking_images import ask_images


@dataclass(frozen=True)
class Options:
    """Answer a question on an image with a decoder that sees."""

    run: Annotated[Path, tyro.conf.Positional]
    """run of --family llava, or model folder"""
    image: Annotated[Path, tyro.conf.Positional]
    """image file"""
    question: Annotated[str, tyro.conf.Positional]
    """what to ask"""
    max_tokens: int = 64
    """longest answer in tokens"""
    temperature: float = 0.0
    """of sampling; 0 takes the likeliest token each time"""
    seed: int = 0
    """of sampling"""
    prompt: str | None = None
    """text with <image> and {question}, for models with another tokenizer (default: LLaVA 1.5's)"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0."""
    options = read_options(Options, args=argv, prog="plinth image ask")
    params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens, seed=options.seed)
    [answer] = ask_images(options.run, [(options.image, options.question)], params, prompt=options.prompt)
    result = {
        "image": str(options.image),
        "question": options.question,
        "answer": answer.text.strip(),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
    }
    emit(result, options.json, lambda console: console.print(answer.text.strip(), markup=False, highlight=False))
    return 0
