"""Conversations or plain texts as tokens of which some are learnt, for what looks at every learnt token: distillation and its teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plinth.config import UserError
from plinth.posttraining.examples import Examples
from plinth.posttraining.formats import read_examples
from plinth.posttraining.masks import answers_apart, render_row
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer


def check_same_tokenizer(student: Tokenizer, teacher: Tokenizer, where: Sequence[Path]) -> None:
    """Raise UserError when the ids of student and teacher do not mean the same."""
    if student.sha256 != teacher.sha256:
        raise UserError(
            f"tokenizer {teacher.sha256[:8]} of the teacher {where[1]} differs from {student.sha256[:8]} of the student {where[0]}, so "
            "their distributions are over other tokens. Let the teacher write answers with `plinth best-of`; learn them with `plinth sft`."
        )


def read_texts(path: Path, tokenizer: Tokenizer) -> Examples:
    """Read a file as plain texts where most of its rows are, else as conversations, apart where the chat template asks for that."""
    found = read_examples(path)
    return answers_apart(tokenizer, found if found.kind in ("text", "messages") else read_examples(path, "messages"))


def render_texts(tokenizer: Tokenizer, found: Examples, max_seq_len: int) -> list[Rendered]:
    """Return tokens and masks of texts or conversations.

    Raises UserError for one of more than `max_seq_len` + 1 tokens, of which the last is predicted but not read, or with nothing learnt.
    """
    examples = []
    for number, row in zip(found.numbers, found.rows):
        rendered = render_row(tokenizer, row)[0].rendered
        if len(rendered.tokens) > max_seq_len + 1:
            raise UserError(
                f"row {number} has {len(rendered.tokens)} tokens, more than max_seq_len={max_seq_len}. "
                "Shorten it, or take models with a longer context."
            )
        if not any(rendered.loss_mask[1:]):
            raise UserError(f"row {number} has no learnt token. `plinth inspect` shows which tokens are.")
        examples.append(rendered)
    return examples
