"""Prompts to answer, out of any file of training examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plinth.config import UserError
from plinth.data.rejects import row_counts
from plinth.posttraining.examples import Conversation, Preference, Prompt, Ranking, Row, Unpaired
from plinth.posttraining.formats import detect, read_records
from plinth.posttraining.turns import read_prompt
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer


def read_prompts(path: Path | str) -> list[Prompt]:
    """Read prompts: of rows {"prompt"}, or of any format that `plinth inspect` knows, what stands before the last answer.

    A row with a prompt that fits no format, whatever else it says, is that prompt. The same conversation is asked once, at its first place.
    Raises UserError for a row without a prompt, with its number.
    """
    found: dict[str, Prompt] = {}
    for number, record in read_records(Path(path)):
        try:
            prompt = _read(record)
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        found.setdefault(repr((prompt.messages, prompt.answer)), prompt)
    if not found:
        raise UserError(f"{path} holds no prompt.")
    return list(found.values())


def _read(record: Any) -> Prompt:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"is of type {type(record).__name__}, not an object with a prompt")
    try:
        form = detect(record)
    except UserError:
        if record.get("prompt") is None:
            raise
        return Prompt(read_prompt(record["prompt"]))
    row: Row = form.read(record)
    match row:
        case Prompt():
            return row
        case Preference() | Ranking() | Unpaired():
            return Prompt(row.prompt)
        case Conversation():
            return _before_last_answer(row)
    raise UserError(f"is {form.name}, which has no prompt")


def _before_last_answer(row: Conversation) -> Prompt:
    last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    messages = [{name: value for name, value in message.items() if name != "weight"} for message in row.messages[:last]]
    if not messages:
        raise UserError("begins with its answer")
    return Prompt(messages)


def matching(prompts: Sequence[Prompt], pattern: str | None) -> list[Prompt]:
    """Return the prompts whose last message a regular expression matches. Raises UserError where there is none."""
    chosen = [prompt for prompt in prompts if pattern is None or re.search(pattern, prompt.text)]
    if not chosen:
        raise UserError(f"prompt.pattern={pattern!r} matches none of {len(prompts)} prompts. Loosen it.")
    return chosen


def prompt_tokens(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int, too_long: str
) -> tuple[list[Prompt], list[list[int]], dict[str, int]]:
    """Return the prompts that are asked, their tokens, the assistant's header behind them, and `row_counts` of those too long or cut.

    `too_long` says what becomes of one with more than `max_tokens`: error, truncate (its end is kept) or drop.
    """
    kept, tokens, cut = [], [], 0
    for prompt in prompts:
        rendered = render(tokenizer, prompt.messages, add_generation_prompt=True).tokens
        if len(rendered) > max_tokens and too_long == "error":
            raise UserError(
                f"prompt {prompt.text[:60]!r} has {len(rendered)} tokens, more than the {max_tokens} that the context leaves beside a "
                "completion. Lower sample.max_tokens, or set prompt.too_long to truncate or drop."
            )
        if len(rendered) <= max_tokens or too_long == "truncate":
            kept.append(prompt)
            tokens.append(rendered[-max_tokens:])
            cut += len(rendered) > max_tokens
    if not kept:
        raise UserError(f"all {len(prompts)} prompts have more than {max_tokens} tokens. Lower sample.max_tokens.")
    return kept, tokens, row_counts(too_long=len(prompts) - len(kept), cut=cut)
