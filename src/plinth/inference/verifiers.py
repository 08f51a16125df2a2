"""Checks of an answer against what the data says of it: the one registry that rewards and evaluations read.

A verifier takes the text and the example's answer and gives a number, 1 for right and 0 for wrong. The answer is a text; JSON where it
holds more than one thing. A mistake in the answer itself raises UserError, for it is the data's; nothing in the text can.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from plinth.config import UserError, nearest
from plinth.inference.code_sandbox import Limits, check_tests, passes_tests
from plinth.inference.json_validity import SchemaChecker, Undecided, check_schema, found_in
from plinth.inference.sql import run_query
from plinth.tasks.numbers import numbers_in
from plinth.tasks.verify import exact_match, is_refusal, token_f1

Verifier = Callable[[str, str], float]
MAX_ROWS = 10_000
NUMERIC_TOLERANCE = 1e-6  # relative, absolute below 1

_FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n```|```|\Z)", re.DOTALL)


def verify(name: str, text: str, answer: str) -> float:
    """Return what the verifier called `name` says of a text. Raises UserError for an unknown name and for an answer that it can't read."""
    return check_name(name)(text, answer)


def check_name(name: str) -> Verifier:
    """Return the verifier of a name. Raises UserError when there is none."""
    if name not in VERIFIERS:
        raise UserError(f"verifier={name!r} is none of {', '.join(VERIFIERS)}.{nearest(name, VERIFIERS)}")
    return VERIFIERS[name]


def check_answer(name: str, answer: str) -> None:
    """Raise UserError for an unknown name, and for an answer that its verifier cannot read. Tests of programs are not run."""
    if name == "code":
        check_tests(_tests(answer)[0])
    else:
        verify(name, "", answer)


def exact(text: str, answer: str) -> float:
    """Return 1 for a text equal to the answer, or to one of a JSON list of answers, but for case, spaces and the last full stop."""
    return exact_match(text, _answers(answer))


def words(text: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of words, the best over a JSON list of answers; between 0 and 1."""
    return token_f1(text, _answers(answer))


def numeric(text: str, answer: str) -> float:
    """Return 1 when the last number of a text is the answer's value.

    The answer is a number as `tasks.numbers` reads it, the last one in it, or {"value": number or text, "tolerance": t}, which allows a
    difference of t; without one, NUMERIC_TOLERANCE of the value.
    """
    given = _object(answer)
    wanted = numbers_in(str(given["value"] if "value" in given else answer))
    if not wanted:
        raise UserError(f"verifier=numeric, but the answer {answer[:80]!r} holds no number.")
    found, value = numbers_in(text), wanted[-1]
    tolerance = given.get("tolerance", NUMERIC_TOLERANCE * max(1, abs(value)))
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float, Fraction)) or not tolerance >= 0:
        raise UserError(f"verifier=numeric, but the tolerance of the answer {answer[:80]!r} is no number of 0 or more.")
    return float(bool(found) and abs(found[-1] - value) <= tolerance)


def regex(text: str, answer: str) -> float:
    """Return 1 when the answer, a regular expression, matches somewhere in a text; ^ and $ are its ends. Takes time linear in the text."""
    try:
        return float(found_in(answer, text.strip()))
    except Undecided as error:
        try:
            re.compile(answer)
        except re.error as mistake:
            raise UserError(f"verifier=regex: the pattern {answer[:80]!r} is no regular expression: {mistake}.") from None
        raise UserError(f"verifier=regex: {error}. Write it without look-around and back-references.") from None


def json_schema(text: str, answer: str) -> float:
    """Return 1 when a text, or the fenced block in it, is JSON that the answer, a JSON Schema, allows."""
    return float(_schema(answer).valid(code_in(text).strip()))


def code(text: str, answer: str) -> float:
    """Return 1 when the Python program in a text passes the answer's tests in a sandbox.

    The answer is source text with assert statements, run behind the program, or {"tests": source, "time_s": s, "memory_bytes": n}.
    """
    tests, limits = _tests(answer)
    return float(passes_tests(code_in(text), tests, limits).passed)


def sql(text: str, answer: str) -> float:
    """Return 1 when the query in a text gives the rows that the answer's query gives.

    The answer is {"database": path of an SQLite file, "query": right query, "ordered": whether the order of rows counts}; order counts
    by default when the right query has ORDER BY. Names of columns do not count. What changes the database, or takes a second, is wrong.
    """
    given = _object(answer)
    if not isinstance(given.get("database"), str) or not isinstance(given.get("query"), str):
        raise UserError(f'verifier=sql, but the answer {answer[:80]!r} has no "database" and "query".')
    wanted = _rows(given["database"], given["query"])
    try:
        found = run_query(given["database"], code_in(text).strip().rstrip(";"), max_rows=MAX_ROWS)
    except UserError:
        return 0.0
    if found.truncated:
        return 0.0
    if given.get("ordered", "order by" in given["query"].lower()):
        return float(found.rows == list(wanted))
    return float(Counter(found.rows) == Counter(wanted))


def refusal(text: str, answer: str) -> float:
    """Return 1 for a text that declines to answer; the answer is not read."""
    return float(is_refusal(text))


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "words": words,
    "numeric": numeric,
    "regex": regex,
    "json": json_schema,
    "code": code,
    "sql": sql,
    "refusal": refusal,
}


def code_in(text: str) -> str:
    """Return what stands in the last fenced block of a text, the whole text where it has none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def _answers(answer: str) -> list[str]:
    if answer.lstrip().startswith("["):
        try:
            found = json.loads(answer)
        except ValueError:
            return [answer]
        if isinstance(found, list) and found:
            return [str(each) for each in found]
    return [answer]


def _object(answer: str) -> dict[str, Any]:
    """Return the answer's fields, none where it is no JSON object."""
    if not answer.lstrip().startswith("{"):
        return {}
    try:
        found = json.loads(answer)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tests(answer: str) -> tuple[str, Limits]:
    given = _object(answer)
    if not given:
        return answer, Limits()
    if not isinstance(given.get("tests"), str):
        raise UserError(f'verifier=code, but the answer {answer[:80]!r} has no text under "tests".')
    return given["tests"], Limits(**{name: given[name] for name in ("time_s", "memory_bytes") if name in given})


@lru_cache(maxsize=512)
def _schema(answer: str) -> SchemaChecker:
    try:
        schema = json.loads(answer)
        check_schema(schema)
        return SchemaChecker(schema)
    except (ValueError, RecursionError) as error:
        raise UserError(f"verifier=json, but the answer {answer[:80]!r} is no JSON Schema: {error}.") from None


@lru_cache(maxsize=4096)
def _rows(database: str, query: str) -> tuple[tuple[Any, ...], ...]:
    try:
        return tuple(run_query(database, query, max_rows=MAX_ROWS).rows)
    except UserError as error:
        raise UserError(f"verifier=sql: the right query {query[:80]!r} does not run on {database}: {error}") from None
