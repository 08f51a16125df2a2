"""From messages to tokens and their loss mask: the one renderer that training and serving share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError, nearest
from plinth.tokenizer.encode import ASSISTANT, END, SYSTEM, USER, Tokenizer
from plinth.tokenizer.published_template import RewrittenAnswer, check_answers_stay, render_published
from plinth.tokenizer.tool_format import (
    RESPONSE_END,
    RESPONSE_START,
    Tool,
    answer_text,
    check_tool_calls,
    check_tools,
    plain_calls,
    tools_text,
)

Message = dict[str, Any]
HEADERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
ROLES = (*HEADERS, "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields for what an assistant thought before it answered


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    tokens: list[int]
    """Token ids."""
    loss_mask: list[bool]
    """Of each token, whether the model is taught to predict it: the assistant's text and the <|end|> behind it."""


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    add_generation_prompt: bool = False,
    tools: list[Tool] | None = None,
    *,
    learnt: Collection[int] | None = None,
) -> Rendered:
    """Return the tokens of a conversation: a header token, the text, <|end|>, turn by turn.

    With `add_generation_prompt` the assistant's header follows, ready for its answer. `tools` are described in the system's turn.
    A special token written in a text stays text. A tokenizer that another project published is rendered by its own chat template.
    `learnt` are the places of the assistant's messages that are taught, by default all. Raises UserError for an empty list, an unknown
    role, malformed tools or calls, a conversation that such a template refuses, or a tokenizer that has neither header tokens nor a
    template; RewrittenAnswer where a template writes a learnt message in another way than at the end of a conversation.
    """
    if not tokenizer.is_ours and tokenizer.chat_template() is not None:
        check_messages(messages)
        if tools:
            check_tools(tools)
        taught = [] if add_generation_prompt else sorted(answers_of(messages) if learnt is None else learnt)
        return Rendered(*render_published(tokenizer, for_template(messages), add_generation_prompt, tools, learnt=taught))
    turns = to_turns(messages, tools)
    unlearnt = {i for i, place in enumerate(answers_of(messages)) if learnt is not None and place not in learnt}
    answer = -1
    end_id = _required_id(tokenizer, END)
    tokens: list[int] = []
    loss_mask: list[bool] = []
    contents = tokenizer.encode_batch([text for _, text in turns])
    for (role, _), content in zip(turns, contents):
        answer += role == "assistant"
        tokens += [_required_id(tokenizer, HEADERS[role]), *content, end_id]
        loss_mask += [False] + [role == "assistant" and answer not in unlearnt] * (len(content) + 1)
    if add_generation_prompt:
        tokens.append(_required_id(tokenizer, ASSISTANT))
        loss_mask.append(False)
    return Rendered(tokens, loss_mask)


def answers_of(messages: list[Message]) -> list[int]:
    """Return the places of the assistant's messages."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def is_rewritten(tokenizer: Tokenizer, messages: list[Message], tools: list[Tool] | None = None, *, learnt: Collection[int]) -> bool:
    """Return whether the chat template writes a learnt message in another way once later turns follow, so that `render` raises that.

    Raises UserError as `render` does for other reasons.
    """
    if tokenizer.is_ours or tokenizer.chat_template() is None:
        return False
    check_messages(messages)
    try:
        check_answers_stay(tokenizer, for_template(messages), tools, sorted(learnt))
    except RewrittenAnswer:
        return True
    return False


def to_turns(messages: list[Message], tools: list[Tool] | None = None) -> list[tuple[str, str]]:
    """Return a conversation as (role, text), the roles system, user and assistant: calls written out, results in a user's turn."""
    check_messages(messages)
    turns: list[tuple[str, str]] = []
    if tools:
        check_tools(tools)
        first = messages[0]["role"] == "system"
        turns.append(("system", (messages[0]["content"] + "\n\n" if first else "") + tools_text(tools)))
        messages = messages[1:] if first else messages
    previous = None
    for message in messages:
        if message["role"] == "tool":
            text = RESPONSE_START + message["content"] + RESPONSE_END
            if previous == "tool":  # results of one answer's calls share a turn
                turns[-1] = ("user", f"{turns[-1][1]}\n{text}")
            else:
                turns.append(("user", text))
        else:
            turns.append((message["role"], answer_text(message.get("content") or "", message.get("tool_calls") or [])))
        previous = message["role"]
    return turns


def for_template(messages: list[Message]) -> list[Message]:
    """Return messages as templates take them: a call's arguments as an object, not as JSON text; reasoning under every name for it."""
    plain = []
    for message in messages:
        calls = {"tool_calls": plain_calls(message["tool_calls"])} if message.get("tool_calls") else {}
        reasoning = next((message[key] for key in REASONING if message.get(key)), None)
        plain.append({**message, **calls, **(dict.fromkeys(REASONING, reasoning) if reasoning else {})})
    return plain


def _required_id(tokenizer: Tokenizer, name: str) -> int:
    token_id = tokenizer.special_id(name)
    if token_id is None:
        raise UserError(f"this tokenizer has no special token {name}, and no chat template. Use one that has either.")
    return token_id


def check_messages(messages: Any) -> None:
    """Raise UserError unless `messages` is a list of {role, content} with known roles and text.

    An assistant's message may have tool_calls, and then no content; one of role tool has what a tool returned as its content.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages is not a list with at least one message.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"messages[{i}] is not an object with role and content.")
        if "role" not in message:
            raise UserError(f"messages[{i}] has no 'role'.{nearest('role', message)}")
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"messages[{i}].role={role!r} is not one of {', '.join(ROLES)}.{nearest(str(role), ROLES)}")
        if message.get("tool_calls"):
            if role != "assistant":
                raise UserError(f"messages[{i}] of role {role} has tool_calls; only an assistant's may.")
            check_tool_calls(message["tool_calls"], f"messages[{i}].tool_calls")
            if message.get("content") is None:
                continue
        if "content" not in message:
            raise UserError(f"messages[{i}] has no 'content'.{nearest('content', message)}")
        if not isinstance(message["content"], str):
            raise UserError(f"messages[{i}].content is of type {type(message['content']).__name__}, not text.")
