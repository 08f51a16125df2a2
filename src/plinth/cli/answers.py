"""What `--answer-cache` means for the commands that generate."""

from __future__ import annotations

from pathlib import Path

from plinth.config import UserError
from plinth.inference.answer_cache import AnswerCache
from plinth.inference.text import TextEngine
from plinth.posttraining.adapter_files import find_adapter
from plinth.run import find_model, tree_sha256


def keep_answers(text: TextEngine, run: Path, path: Path | None, min_likeness: float | None, adapter: Path | None = None) -> None:
    """Make an engine keep its answers in a file; None = it does not. Raises UserError when the file is something else."""
    if path is None:
        if min_likeness is not None:
            raise UserError("--min-likeness needs --answer-cache FILE.")
        return
    runner = text.engine.runner
    identity = {
        "model_sha256": tree_sha256(find_model(run)),  # weights, configuration and tokenizer
        "weights": runner.weights,
        "runner": type(runner).__name__,
        "max_seq_len": text.engine.max_seq_len,
        **({} if adapter is None else {"adapter_sha256": tree_sha256(find_adapter(adapter))}),
    }
    text.engine.answers = AnswerCache(path, identity, min_likeness=min_likeness)
