"""Rows as tokens with the mask of what is learnt: the one place that says which tokens a row trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plinth.config import UserError
from plinth.posttraining.examples import Conversation, Preference, Prompt, Ranking, Row, TextRow, Unpaired, unweighted
from plinth.tokenizer.chat import Message, Rendered, render
from plinth.tokenizer.encode import Tokenizer


@dataclass(frozen=True)
class Part:
    """One sequence of a row, as it goes through the model."""

    name: str
    """which sequence of its row: text, conversation, chosen, rejected, completion, prompt"""
    rendered: Rendered
    """tokens, and of each whether the model is taught to predict it"""


def render_row(tokenizer: Tokenizer, row: Row) -> list[Part]:
    """Return a row's sequences: one of a conversation, two of a pair, one for each answer of a ranking.

    Of answers to a prompt the answer alone is learnt, not earlier answers within the prompt. Raises UserError as `render` does.
    """
    match row:
        case TextRow():
            end = tokenizer.end_of_text_id
            tokens = tokenizer.encode(row.text) + ([] if end is None else [end])
            return [Part("text", Rendered(tokens, [i > 0 for i in range(len(tokens))]))]
        case Conversation():
            return [Part("conversation", render_weighted(tokenizer, row.messages, row.tools))]
        case Preference():
            sides = (("chosen", row.chosen), ("rejected", row.rejected))
            return [Part(name, render_weighted(tokenizer, unweighted(row.prompt) + side, row.tools)) for name, side in sides]
        case Ranking():
            return [
                Part(f"completion of rank {rank + 1}", render_weighted(tokenizer, unweighted(row.prompt) + answer))
                for rank, answer in zip(row.ranks, row.completions)
            ]
        case Unpaired():
            name = "wanted" if row.label else "unwanted"
            return [Part(f"{name} completion", render_weighted(tokenizer, unweighted(row.prompt) + row.completion))]
        case Prompt():
            tokens = render(tokenizer, row.messages, add_generation_prompt=True).tokens
            return [Part("prompt", Rendered(tokens, [False] * len(tokens)))]  # what is learnt are the model's own answers


def render_weighted(tokenizer: Tokenizer, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Rendered:
    """Return a conversation's tokens and mask, in which the assistant's messages of weight 0 are not learnt.

    Raises UserError when the tokenizer's chat template writes the earlier turns in another way once later ones follow: then it is not
    clear which tokens are whose.
    """
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    rendered = render(tokenizer, plain, tools=tools)
    mask = list(rendered.loss_mask)
    for first, last in unlearnt_stretches(messages):
        start, end = (_prefix_length(tokenizer, plain, stop, tools, rendered) for stop in (first, last))
        mask[start:end] = [False] * (end - start)
    return Rendered(rendered.tokens, mask)


def unlearnt_stretches(messages: list[Message]) -> list[tuple[int, int]]:
    """Return (first, one past the last) of the longest stretches of messages with an unlearnt answer and without a learnt one."""
    stretches, start = [], 0
    learnt = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]
    for stop in [*learnt, len(messages)]:
        if any(message["role"] == "assistant" for message in messages[start:stop]):
            stretches.append((start, stop))
        start = stop + 1
    return stretches


def _prefix_length(tokenizer: Tokenizer, messages: list[Message], count: int, tools: Any, whole: Rendered) -> int:
    """Return how many tokens the first `count` messages have within the whole conversation."""
    if count in (0, len(messages)):
        return 0 if count == 0 else len(whole.tokens)
    tokens = render(tokenizer, messages[:count], tools=tools).tokens
    if whole.tokens[: len(tokens)] != tokens:
        raise UserError(
            f"the tokenizer's chat template writes messages[:{count}] in another way when more turns follow, "
            "so weight=0 and answers within a prompt cannot be told apart. Leave the earlier answers out."
        )
    return len(tokens)
