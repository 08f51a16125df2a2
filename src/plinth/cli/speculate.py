"""What `--speculate` means for the commands that generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.runners import Weights, make_runner
from plinth.inference.speculative import PROMPT_LOOKUP, Speculation
from plinth.inference.text import TextEngine
from plinth.models.hub import load_decoder
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer


def speculate(text: TextEngine, how: str | None, draft_tokens: int | None, weights: Weights | None = None) -> None:
    """Make an engine guess, `how` being 'prompt-lookup' or the folder of a smaller model; None = it does not.

    Raises UserError when the smaller model is not there or was trained with another tokenizer.
    """
    if how is None:
        if draft_tokens is not None:
            raise UserError("--draft-tokens needs --speculate prompt-lookup or --speculate MODEL.")
        return
    draft = None if how == PROMPT_LOOKUP else _draft_engine(text, Path(how), weights)
    speculation = Speculation(draft, draft_tokens)
    speculation.check(text.engine)
    text.engine.drafting = speculation.drafter


def _draft_engine(text: TextEngine, path: Path, weights: Weights | None) -> Engine:
    folder = find_model(path)
    tokenizer = Tokenizer.load(folder)
    probe = "The 1st test, naïve: 東京\n\tdef f(x):"
    if tokenizer.vocab_size != text.tokenizer.vocab_size or tokenizer.encode(probe) != text.tokenizer.encode(probe):
        raise UserError(f"{path} was trained with another tokenizer than the model. Speculation needs one with the same.")
    # Beside its sequence a request holds a block for each token guessed.
    return Engine(make_runner(load_decoder(folder).eval(), weights), max_batch=3 * text.engine.max_batch)


def speculation_counts(engine: Engine) -> dict[str, Any]:
    """Return what guessing gave, {} where nothing was guessed."""
    counters = engine.counters
    if not counters.drafted:
        return {}
    return {"drafted": counters.drafted, "accepted": counters.accepted, "acceptance": counters.accepted / counters.drafted}
