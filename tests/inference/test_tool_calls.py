"""Tool calls: one parser whose result does not depend on how the text is cut, and a grammar whose calls it always reads."""

import json
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.inference.grammar_constraint import GrammarCompiler
from plinth.inference.tool_calls import ToolCall, ToolCallParser, parse_answer, tool_grammar, why_call_invalid
from plinth.tokenizer.chat import to_turns

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def same_id() -> str:
    return "call"


def call(name: str, arguments: str) -> ToolCall:
    return ToolCall("call", name, arguments)


WEATHER_CALL, NOW_CALL = call("get_weather", '{"city": "Köln"}'), call("now", "{}")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain text", "plain text", []),
        (CALL, "", [WEATHER_CALL]),
        (f"{CALL}\n{NOW}", "", [WEATHER_CALL, NOW_CALL]),
        (f"I look. \n{CALL}\n and {NOW}  ", "I look.and", [WEATHER_CALL, NOW_CALL]),
        (f"{CALL} done\n", "done\n", [WEATHER_CALL]),
        ('<tool_call>{"name":"now","arguments":{}}', "", [NOW_CALL]),
        ('<tool_call>{"name":"now","arguments":{"a":"</tool_call>}\\""}}</tool_call>', "", [call("now", '{"a": "</tool_call>}\\""}')]),
        (CALL[:-20], CALL[:-20], []),
        ("a <tool_call> b", "a <tool_call> b", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": 3, "arguments": {}}', '<tool_call>{"name": 3, "arguments": {}}', []),
        ('<tool_call>{"name": "other", "arguments": {}}', '<tool_call>{"name": "other", "arguments": {}}', []),
        ("<tool_call>" + NOW, "<tool_call>", [NOW_CALL]),
        ("x < y <tool", "x < y <tool", []),
    ],
)
def test_text_and_calls_are_told_apart(text, content, calls):
    found_text, found_calls = parse_answer(text, ("get_weather", "now"), same_id)
    assert found_calls == calls
    assert found_text == content


PIECES = [
    CALL,
    NOW,
    "<tool_call>",
    "</tool_call>",
    '{"name": "now", "arguments": {}}',
    "text",
    " ",
    "\n",
    "<",
    "{",
    '"',
    "}",
    "\\",
    "ö",
    "[",
    "]",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.lists(st.integers(0, 200), max_size=12))
@example([CALL, " ", "\n", NOW], list(range(200)))
def test_every_way_to_cut_a_stream_gives_the_same_answer(pieces, cuts):
    text = "".join(pieces)
    whole = parse_answer(text, new_id=same_id)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parser, found = ToolCallParser(new_id=same_id), []
    for start, end in zip(bounds, bounds[1:]):
        found += parser.push(text[start:end])
    found += parser.flush()
    assert "".join(item for item in found if isinstance(item, str)) == whole[0]
    assert [item for item in found if isinstance(item, ToolCall)] == whole[1]
    assert parser.num_calls == len(whole[1])


def test_text_comes_as_soon_as_it_can_be_no_call():
    parser = ToolCallParser(new_id=same_id)
    assert parser.push("Hello the") == ["Hello the"]
    assert parser.push("re <tool") == ["re"]
    assert parser.push("box> ") == [" <toolbox>"]
    assert parser.push(CALL[:-12]) == [WEATHER_CALL]


def test_what_the_renderer_writes_is_read_back():
    message = {"role": "assistant", "content": "Both.", "tool_calls": [WEATHER_CALL.message(), NOW_CALL.message()]}
    assert parse_answer(to_turns([message])[0][1], new_id=same_id) == ("Both.", [WEATHER_CALL, NOW_CALL])


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, (tokenizer.end_id,))


def drawn(compiler, grammar, seed, max_tokens=250, start=""):
    draw, constraint, tokens = random.Random(seed), compiler.start(grammar, max_tokens), []
    forced_text = compiler.tokenizer.encode(start)
    while len(tokens) < max_tokens and not constraint.finished():
        ids = np.unpackbits(constraint.allowed(), bitorder="little").nonzero()[0].tolist()
        token = forced_text[len(tokens)] if len(tokens) < len(forced_text) else (constraint.forced() or [draw.choice(ids)])[0]
        assert token in ids
        if token in compiler.end_ids:
            break
        constraint.advance(token)
        tokens.append(token)
    return compiler.tokenizer.decode(tokens), constraint


@pytest.mark.parametrize(("choice", "names"), [("required", {"get_weather", "now"}), ("get_weather", {"get_weather"}), ("now", {"now"})])
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_calls_and_nothing_else(compiler, choice, names, parallel):
    for seed in range(6):
        text, constraint = drawn(compiler, tool_grammar(TOOLS, choice, parallel=parallel), seed)
        content, calls = parse_answer(text, names)
        assert content == "" and calls and constraint.error is None, text
        assert parallel or len(calls) == 1
        assert all(why_call_invalid(call, TOOLS) is None for call in calls)


def test_what_begins_like_a_call_becomes_one(compiler):
    text, _ = drawn(compiler, tool_grammar(TOOLS, "auto", parallel=False), 0, start='It is "said: <tool_call>', max_tokens=200)
    content, calls = parse_answer(text, {"get_weather", "now"})
    assert calls and content.startswith('It is "said:') and why_call_invalid(calls[0], TOOLS) is None
    assert compiler.accepts(tool_grammar(TOOLS, "auto"), "only text")
    assert not compiler.accepts(tool_grammar(TOOLS, "auto"), "a <tool_call> b")
    assert not compiler.accepts(tool_grammar(TOOLS, "required"), "only text")


def test_arguments_are_judged_by_the_schema():
    assert why_call_invalid(call("get_weather", "{}"), TOOLS) == "'city' is a required property"
    assert why_call_invalid(call("other", "{}"), TOOLS) == "there is no tool 'other'"
    assert why_call_invalid(WEATHER_CALL, TOOLS) is None


def test_a_schema_with_definitions_of_its_own_is_enforced(compiler):
    parameters = {"type": "object", "properties": {"n": {"$ref": "#/$defs/small"}}, "required": ["n"], "$defs": {"small": {"enum": [1, 2]}}}
    grammar = tool_grammar([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert compiler.accepts(grammar, '<tool_call>\n{"name": "f", "arguments": {"n": 2}}\n</tool_call>')
    assert not compiler.accepts(grammar, '<tool_call>\n{"name": "f", "arguments": {"n": 3}}\n</tool_call>')


def test_what_cannot_be_enforced_is_named(compiler):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"uniqueItems": True}}}}}
    with pytest.raises(UserError, match="uniqueItems"):
        compiler.compile(tool_grammar([tool]))
    with pytest.warns(UserWarning, match="uniqueItems"):
        compiler.compile(tool_grammar([tool], mode="lenient"))
    with pytest.raises(UserError, match="tool_choice='get_wether' is not .* Did you mean get_weather?"):
        tool_grammar(TOOLS, "get_wether")
    with pytest.raises(UserError, match="type='objekt'"):
        tool_grammar([{"type": "function", "function": {"name": "f", "parameters": json.loads('{"type": "objekt"}')}}])
