"""Messages in the spellings that data sets use, as ours; transcripts split by role, and pairs split into prompt and answers."""

from __future__ import annotations

import json
import re
from typing import Any

from plinth.config import UserError
from plinth.tokenizer.chat import REASONING, Message, check_messages

ROLE_NAMES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "ai": "assistant", "model": "assistant",
    "developer": "system", "function": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
MESSAGE_FIELDS = frozenset({"role", "content", "from", "value", "tool_calls", "weight", *REASONING})
CONVERSATIONS = ("messages", "conversations")  # fields that hold messages and never a text
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


def read_turns(value: Any, where: str = "messages") -> list[Message]:
    """Return messages with role, content and, where given, tool_calls, weight and reasoning_content; other spellings are understood.

    Raises UserError for what is no list of messages, an unknown role, content that is not text, or a weight that is neither 0 nor 1.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where} is {'not' if where in CONVERSATIONS else 'neither text nor'} a list of messages")
    messages = [_read_message(message, f"{where}[{i}]") for i, message in enumerate(value)]
    try:
        check_messages(messages)
    except UserError as error:
        raise UserError(str(error).replace("messages", where, 1).rstrip(".")) from None
    return messages


def _read_message(record: dict[str, Any], where: str) -> Message:
    message: Message = {}
    name = record.get("role", record.get("from"))
    if name is not None:
        message["role"] = ROLE_NAMES.get(name, name) if isinstance(name, str) else name
    for key in ("content", "value"):
        if key in record:
            message["content"] = _text_of_parts(record[key], where)
            break
    if record.get("tool_calls"):
        message["tool_calls"] = record["tool_calls"]
    elif name == "function_call":
        message |= {"content": "", "tool_calls": [{"type": "function", "function": _call(message.get("content"), where)}]}
    if (weight := record.get("weight")) is not None:
        if weight not in (0, 1):
            raise UserError(f"{where}.weight={weight!r} is neither 0 nor 1")
    if message.get("role") == "assistant":  # other roles are never learnt
        if weight is not None:
            message["weight"] = int(weight)
        if reasoning := next((record[key] for key in REASONING if record.get(key)), None):
            message["reasoning_content"] = _text_of_parts(reasoning, where)
            if not isinstance(message["reasoning_content"], str):
                raise UserError(f"{where} has reasoning that is not text")
    return message


def _text_of_parts(content: Any, where: str) -> Any:
    """Return the text of content given as parts. Raises UserError for a part that is no text, such as an image."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}.content has a part of type {kind}, which text models cannot learn")
    return "".join(part["text"] for part in content)


def _call(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError):
        raise UserError(f"{where} is a function_call whose value is not JSON") from None


def is_transcript(value: Any) -> bool:
    """Return whether a text begins with a speaker's name as hh-rlhf's transcripts do."""
    return isinstance(value, str) and bool(re.match(r"\n\n(Human|Assistant):", value))


def split_transcript(text: str) -> list[Message]:
    r"""Split a transcript, "\n\nHuman: ...\n\nAssistant: ...", into messages.

    A turn's text is all that stands between two speakers' names but for the one blank behind the name, so joining gives the transcript
    again. Raises UserError for text before the first speaker. Source: Bai et al. 2022, arXiv:2204.05862, the data's own form.
    """
    marks = list(TURN.finditer(text))
    if not marks or marks[0].start() != 0:
        raise UserError("is a transcript with text before the first speaker")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [{"role": SPEAKERS[mark[1]], "content": text[mark.end() : end]} for mark, end in zip(marks, ends)]


def read_prompt(value: Any, where: str = "prompt") -> list[Message]:
    """Return a prompt given as a text, a transcript that may end with the assistant's name, or messages."""
    if not isinstance(value, str):
        return read_turns(value, where)
    if not is_transcript(value):
        return [{"role": "user", "content": value}]
    turns = split_transcript(value)
    return turns[:-1] if len(turns) > 1 and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns


def read_answer(value: Any, prompt: list[Message], where: str) -> list[Message]:
    """Return a continuation given as a text, messages, or a whole conversation that begins with the prompt.

    Raises UserError when it does not begin with the assistant's message: then the prompts differ.
    """
    if isinstance(value, str) and not is_transcript(value):
        return [{"role": "assistant", "content": value}]
    turns = split_transcript(value) if isinstance(value, str) else read_turns(value, where)
    same = common_turns(prompt, turns)
    turns = turns[same:] if same == len(prompt) else turns
    if not turns or turns[0]["role"] != "assistant":
        raise UserError(f"{where} does not continue the prompt with a message of the assistant")
    return turns


def common_turns(first: list[Message], second: list[Message]) -> int:
    """Return how many messages two conversations begin with in common, weights aside."""
    count = 0
    for one, other in zip(first, second):
        if {**one, "weight": 1} != {**other, "weight": 1}:
            break
        count += 1
    return count


def split_pair(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations into the messages that both begin with, and the two continuations, at whole messages.

    Cutting at the longest common text instead would take the first words of both answers for the prompt.
    Raises UserError when they part at a message that is not the assistant's.
    """
    same = min(common_turns(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if chosen[same]["role"] != "assistant" or rejected[same]["role"] != "assistant" or same == 0:
        raise UserError(
            f"chosen and rejected have different prompts: they part at message {same + 1} of {len(chosen)} and {len(rejected)}, "
            "which is not the assistant's"
        )
    return chosen[:same], chosen[same:], rejected[same:]
