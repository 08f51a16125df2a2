"""Rows as tokens with the mask of what is learnt: the one place that says which tokens a row trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from plinth.config import UserError
from plinth.posttraining.examples import Conversation, Examples, Preference, Prompt, Ranking, Row, TextRow, Unpaired, unweighted
from plinth.tokenizer.chat import Message, Rendered, answers_of, is_rewritten, render
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.tool_format import with_reasoning


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

    Raises UserError as `render` does, RewrittenAnswer among them where the chat template writes a learnt answer in another way once later
    turns follow; `answers_apart` divides conversations into such as it can render.
    """
    return render(tokenizer, plain_messages(tokenizer, messages), tools=tools, learnt=learnt_answers(messages))


def plain_messages(tokenizer: Tokenizer, messages: list[Message]) -> list[Message]:
    """Return messages without weights; in our own form, reasoning in a field of its own is put before the answer's text."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if not tokenizer.is_ours and tokenizer.chat_template() is not None:
        return plain
    return [
        {**message, "content": with_reasoning(message.get("content") or "", message["reasoning_content"])}
        if message.get("reasoning_content")
        else message
        for message in plain
    ]


def learnt_answers(messages: list[Message]) -> list[int]:
    """Return the places of the assistant's messages that are learnt."""
    return [i for i in answers_of(messages) if messages[i].get("weight", 1)]


def scored_tokens(tokenizer: Tokenizer, row: Conversation) -> list[int]:
    """Return the tokens of a conversation as a reward model reads it: to the end of its last answer, the earlier ones as its prompt."""
    return render_weighted(tokenizer, [*unweighted(row.messages[:-1]), row.messages[-1]], row.tools).tokens


def answers_apart(tokenizer: Tokenizer, found: Examples) -> Examples:
    """Return rows in which each conversation that the chat template would write in another way is as many as it has learnt answers.

    Reasoning models' templates leave reasoning out of earlier answers. Each of the new conversations ends with the answer that is learnt
    in it, and has before it what the model will be given before it when it serves.
    """
    rows: list[Row] = []
    numbers: list[int] = []
    for number, row in zip(found.numbers, found.rows):
        parts = _apart(tokenizer, row) if isinstance(row, Conversation) else [row]
        rows += parts
        numbers += [number] * len(parts)
    return found if len(rows) == len(found.rows) else replace(found, rows=rows, numbers=numbers)


def _apart(tokenizer: Tokenizer, row: Conversation) -> list[Conversation]:
    learnt = learnt_answers(row.messages)
    if all(i + 1 == len(row.messages) for i in learnt):
        return [row]  # no turn follows
    try:
        if not is_rewritten(tokenizer, plain_messages(tokenizer, row.messages), row.tools, learnt=learnt):
            return [row]
    except UserError:
        return [row]  # rendering it says why
    return [replace(row, messages=[*unweighted(row.messages[:i]), row.messages[i]]) for i in learnt]
