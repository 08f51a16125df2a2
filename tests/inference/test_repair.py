import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.inference.repair import repair_json

PERSON = {"name": "Ann", "age": 3, "tags": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "value", "changes"),
    [
        ('{"a": 1}', {"a": 1}, ()),
        ('Sure! Here it is:\n```json\n{"a": 1}\n```\nAnything else?', {"a": 1}, ("code fence",)),
        ('The answer is {"a": [1, 2]}. Bye', {"a": [1, 2]}, ("text around it",)),
        ("{'name': 'Ann', 'ok': True, 'x': None}", {"name": "Ann", "ok": True, "x": None}, ("quotation marks", "Python's literals")),
        ('{name: "Ann", age: 3}', {"name": "Ann", "age": 3}, ("name without quotation marks",)),
        ('{"a": [1, 2,], }', {"a": [1, 2]}, ("comma",)),
        ('{"a": 1 "b": 2}', {"a": 1, "b": 2}, ("comma",)),
        ('{"a": 1, // one\n "b": 2 /* two */}', {"a": 1, "b": 2}, ("comment",)),
        ('{"a": "one\ntwo"}', {"a": "one\ntwo"}, ("line break in a text",)),
        ('{"a": [1, {"b": "tw', {"a": [1, {"b": "tw"}]}, ("end cut off",)),
        ('{"a": 1, "b":', {"a": 1}, ("end cut off",)),
        ('{"a": 1, "b', {"a": 1}, ("end cut off",)),
        ("{\u201ca\u201d: 1}", {"a": 1}, ("quotation marks",)),
        ('{"a": "\\ud83d\\ude42 \\u00', {"a": "🙂 "}, ("end cut off",)),
    ],
)
def test_plain_mistakes_are_mended_and_named(text, value, changes):
    repaired = repair_json(text)
    assert repaired.value == value and repaired.changes == changes
    assert json.loads(repaired.text) == value


@pytest.mark.parametrize(
    "text", ["", "no JSON here", "{", '{"a" 1}', "{]", '{"a": 012}', '{"a": maybe}', "[" * 500, '{"a": "\\uZZZZ"}', "```"]
)
def test_what_is_not_plain_is_left_or_empty(text):
    repaired = repair_json(text)
    assert repaired is None or repaired.value in ({}, [])


documents = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(documents)
def test_a_document_is_found_whole_within_a_fence_and_in_python_spelling(document):
    assert repair_json(json.dumps(document)).value == document
    wrapped = {"d": document}
    assert repair_json(f"Here:\n```json\n{json.dumps(wrapped)}\n```").value == wrapped or "```" in json.dumps(wrapped)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, len(json.dumps(PERSON)) - 1))
def test_a_document_cut_off_anywhere_keeps_what_was_complete(length):
    repaired = repair_json(json.dumps(PERSON)[:length])
    assert repaired is not None and set(repaired.value) <= set(PERSON)
    assert all(str(PERSON[key]).startswith(str(value).rstrip("]'")) or key == "tags" for key, value in repaired.value.items())


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="{}[]\":,\\'`# /*truenl01-. \n", max_size=40))
def test_any_text_gives_json_or_nothing(text):
    repaired = repair_json(text)
    assert repaired is None or json.loads(repaired.text) == repaired.value
