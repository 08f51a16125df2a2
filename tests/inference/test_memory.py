"""What of a conversation stays when the context is full."""

import pytest

from plinth.config import UserError
from plinth.inference.memory import fit_window


def said(role, text):
    return {"role": role, "content": text}


def count(messages):
    return sum(len(message["content"]) + 1 for message in messages)


TALK = [said("system", "be kind"), said("user", "one"), said("assistant", "two"), said("user", "three"), said("tool", "four"),
        said("assistant", "five"), said("user", "six")]  # fmt: skip


def test_all_stays_while_it_fits():
    window = fit_window(TALK, count(TALK), count)
    assert window.messages == TALK and window.dropped == [] and window.num_tokens == count(TALK)


def test_whole_exchanges_go_oldest_first_and_the_system_message_stays():
    window = fit_window(TALK, count(TALK) - 1, count)
    assert window.messages == [TALK[0], *TALK[3:]] and window.dropped == TALK[1:3]
    window = fit_window(TALK, count(TALK) - 9, count)
    assert window.messages == [TALK[0], TALK[6]] and window.dropped == TALK[1:6]
    assert window.num_tokens == count(window.messages)


def test_a_last_message_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="the last message has 12 tokens .* room for 11"):
        fit_window(TALK, 11, count)
    with pytest.raises(UserError, match="room for 3"):
        fit_window([said("user", "long")], 3, count)


def test_a_summary_stands_where_messages_were_if_it_fits():
    asked = []

    def summarise(messages):
        asked.append(messages)
        return "s"

    room = count(TALK) - 1
    window = fit_window(TALK, room + 40, count, summarise)
    assert window.dropped == [] and asked == []
    long = [*TALK[:2], said("assistant", "x" * 100), *TALK[3:]]
    window = fit_window(long, 80, count, summarise)
    assert asked == [long[1:3]] and window.messages[1]["content"].endswith("s") and window.messages[2:] == TALK[3:]
    assert window.num_tokens == count(window.messages) <= 80
    assert fit_window(TALK, room, count, lambda _: "y" * 99).messages == [TALK[0], *TALK[3:]]
