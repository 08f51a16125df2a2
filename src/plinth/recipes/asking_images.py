"""Questions on images answered by a decoder that sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.image_questions import question_tokens
from plinth.inference.engine import Engine
from plinth.inference.image_prompts import ImageRunner
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.text import TextCompletion, TextEngine
from plinth.recipes.llava import load_vision_language


def ask_images(
    path: Path,
    asked: Sequence[tuple[Path | np.ndarray, str]],
    params: SamplingParams | None = None,
    *,
    prompt: str | None = None,
    max_batch: int = 32,
    dtype: torch.dtype = torch.float32,
) -> list[TextCompletion]:
    """Answer questions, each on an image (a file, or bytes (H, W, 3)), with the model of a run or model folder; greedily by default.

    Each image is looked at once. `prompt` is how another's tokenizer is asked (plinth.data.image_questions). Raises UserError when
    nothing is asked, for files that are no images, and for questions that do not fit the context.
    """
    if not asked:
        raise UserError("nothing is asked. Give an image and a question.")
    model, files = load_vision_language(path)
    model = model.to(dtype).eval()
    places: dict[object, int] = {}
    for image, _ in asked:
        places.setdefault(image if isinstance(image, Path) else id(image), len(places))
    distinct = {places[image if isinstance(image, Path) else id(image)]: image for image, _ in asked}
    runner = ImageRunner(model, files.processor([distinct[i] for i in range(len(distinct))]))
    engine = Engine(runner, max_batch=min(max_batch, len(asked)), eos_ids=files.end_ids)
    prompts = [
        runner.fill(question_tokens(files.tokenizer, model.config, question, prompt=prompt).tokens, model.config.image_id,
                    [places[image if isinstance(image, Path) else id(image)]])
        for image, question in asked
    ]  # fmt: skip
    return TextEngine(engine, files.tokenizer).complete(prompts, params or SamplingParams(temperature=0.0))
