"""Verifiers: each against answers worked by hand, and laws that all keep."""

import json
import sqlite3
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.inference.verifiers import VERIFIERS, code_in, verify
from plinth.tasks.numbers import numbers_in

SCHEMA = json.dumps({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False})


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "towns.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE town (name TEXT, people INTEGER)")
        connection.executemany("INSERT INTO town VALUES (?, ?)", [("Ulm", 126), ("Bonn", 330), ("Jena", 110)])
    connection.close()
    return path


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("The answer is 42.", [42]),
        ("5-3 = 2", [5, 3, 2]),
        ("x = -3", [-3]),
        ("−7 and +8", [-7, 8]),
        ("1,234,567.5 of 12,34", [Fraction("1234567.5"), 12, 34]),
        (r"3/4 or \frac{1}{3}", [Fraction(3, 4), Fraction(1, 3)]),
        ("12.5% is 1e-3, .5", [Fraction(1, 8), Fraction(1, 1000), Fraction(1, 2)]),
        ("1/0 is none, 2 is", [2]),
        ("none", []),
    ],
)
def test_numbers_in_a_text(text, numbers):
    assert numbers_in(text) == numbers


@given(st.integers(-(10**12), 10**12), st.integers(1, 999))
def test_numbers_come_back_however_they_are_written(value, below):
    assert numbers_in(f"so {value:,}") == numbers_in(f"so {value}") == [value]
    assert numbers_in(f"it is {value}/{below}") == [Fraction(value, below)]


@pytest.mark.parametrize(
    "name, answer, right, wrong",
    [
        ("exact", "Paris", ["Paris", " paris. "], ["Paris, France", "", "London"]),
        ("exact", '["Paris", "Lutetia"]', ["lutetia"], ["Rome"]),
        ("numeric", "42", ["42", "So 6 * 7 = 42.", "42.0", "#### 42", "84/2"], ["", "41", "42 or 43", "4.2"]),
        ("numeric", "3/4", ["0.75", "75%", "6/8"], ["3", "0.7"]),
        ("numeric", "1,000", ["1000", "1e3"], ["1"]),
        ("numeric", '{"value": 3.14159, "tolerance": 0.01}', ["3.14", "22/7"], ["3.2"]),
        ("numeric", '{"value": 100, "tolerance": 0}', ["100"], ["100.0001"]),
        ("regex", "^[A-Z]{2}[0-9]+$", ["AB12", " AB12\n"], ["AB", "xAB12"]),
        ("regex", "yes|ja", ["well, yes"], ["no"]),
        ("json", SCHEMA, ['{"age": 3}', 'Here:\n```json\n{"age": 3}\n```'], ['{"age": "3"}', "{}", "age 3", '{"age": 3} and more']),
        ("code", "assert f(2) == 4", ["def f(x): return x * x", "```python\ndef f(x):\n    return 2 * x\n```"], ["def f(x): return 5"]),
        ("refusal", "-", ["I don't know."], ["Paris"]),
    ],
)
def test_what_is_right_and_what_is_wrong(name, answer, right, wrong):
    assert [verify(name, text, answer) for text in right] == [1.0] * len(right)
    assert [verify(name, text, answer) for text in wrong] == [0.0] * len(wrong)


def test_words_count_in_part():
    assert verify("words", "a copy of the file", "copy file") == pytest.approx(0.8)


def test_sql_is_judged_by_what_it_gives(database):
    answer = json.dumps({"database": str(database), "query": "SELECT name FROM town WHERE people > 120"})
    assert verify("sql", "SELECT t.name AS who FROM town t WHERE 120 < t.people ORDER BY name DESC;", answer) == 1.0
    for wrong in (
        "SELECT name FROM town",
        "SELECT name, people FROM town WHERE people > 120",
        "nonsense",
        "",
        "DROP TABLE town",
        "DELETE FROM town; SELECT name FROM town",
        "SELECT name FROM town WHERE people > 120 UNION ALL SELECT 'Ulm'",
    ):
        assert verify("sql", wrong, answer) == 0.0
    ordered = json.dumps({"database": str(database), "query": "SELECT name FROM town ORDER BY people"})
    assert verify("sql", "```sql\nSELECT name FROM town ORDER BY people ASC\n```", ordered) == 1.0
    assert verify("sql", "SELECT name FROM town ORDER BY people DESC", ordered) == 0.0


def test_endless_queries_are_wrong(database):
    answer = json.dumps({"database": str(database), "query": "SELECT name FROM town"})
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
    assert verify("sql", endless, answer) == 0.0


@pytest.mark.parametrize(
    "name, answer, why",
    [
        ("numeric", "none", "holds no number"),
        ("regex", "(?=x)", "look-around"),
        ("regex", "(", "is no regular expression: missing \\)"),
        ("json", "{", "no JSON Schema"),
        ("code", '{"time_s": 1}', 'no text under "tests"'),
        ("sql", "SELECT 1", 'no "database"'),
        ("sql", '{"database": "absent.sqlite", "query": "SELECT 1"}', "does not run"),
        ("numerc", "1", "numeric"),
    ],
)
def test_mistakes_in_the_answer_are_the_datas(name, answer, why):
    with pytest.raises(UserError, match=why):
        verify(name, "text", answer)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), name=st.sampled_from([n for n in VERIFIERS if n not in ("code", "sql")]))
def test_no_text_makes_a_verifier_fail(text, name):
    """A verifier returns a number between 0 and 1 for any text; unscorable rewards are the data's fault, never the model's."""
    answer = {"json": SCHEMA, "regex": "a+b", "numeric": "7"}.get(name, "seven")
    assert 0.0 <= verify(name, text, answer) <= 1.0


@pytest.mark.parametrize("text", ["\ud800", "9" * 5000, "1e999", "[" * 10000, "-" * 5000, "1," * 3000, "1/" * 3000, "{" * 2000])
def test_odd_texts_are_wrong_quickly(text):
    for name, answer in (("numeric", "7"), ("json", SCHEMA), ("exact", "seven"), ("words", "seven"), ("refusal", "")):
        assert verify(name, text, answer) in (0.0, 1.0)


def test_the_last_fenced_block_is_the_code():
    assert code_in("```\na\n```\nor\n```python\nb\n```") == "b"
    assert code_in("plain") == "plain"
    assert code_in("```python\ncut off") == "cut off"
