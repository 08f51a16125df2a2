"""Whether a text is JSON that a schema allows: jsonschema's judgement, with bounds on what hostile schemas can cost.

Three things are not jsonschema's own: patterns are matched in linear time, the number of checks is bounded, and nothing is
fetched from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from jsonschema import FormatChecker
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import Draft202012Validator, extend, validator_for
from llguidance import LLMatcher, LLTokenizer
from referencing.exceptions import Unresolvable
from referencing.jsonschema import EMPTY_REGISTRY

MAX_CHECKS = 50_000  # keywords applied to one document; a document of some thousand tokens needs a few thousand


class Undecided(Exception):
    """A document that cannot be judged at a bounded cost."""


def check_schema(schema: Any) -> None:
    """Raise ValueError for what is no JSON Schema, such as one with an unknown type."""
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise ValueError(error.message) from None


class SchemaChecker:
    """Validates documents against one schema."""

    def __init__(self, schema: Any):
        self._counter = _Counter()
        cls = _bounded(validator_for(schema, default=Draft202012Validator), self._counter)
        self._validator = cls(schema, registry=EMPTY_REGISTRY, format_checker=FormatChecker())

    def why_invalid(self, text: str) -> str | None:
        """Return what is wrong with a document, or None when it is JSON and the schema allows it."""
        try:
            document = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        self._counter.count = 0
        try:
            error = next(self._validator.iter_errors(document), None)
        except (Undecided, RecursionError) as error:
            return str(error)
        except Unresolvable as error:
            return f"the schema refers to {error.ref!r}, which it does not hold"
        if error is None:
            return None
        where = "/".join(str(part) for part in error.absolute_path)
        return f"{where + ': ' if where else ''}{error.message[:200]}"

    def valid(self, text: str) -> bool:
        """Return whether a text is JSON that the schema allows."""
        return self.why_invalid(text) is None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def counted(self, keyword):
        """Return a keyword's function that ends a validation which has gone on for too long."""

        def check(validator, value, instance, schema):
            self.count += 1
            if self.count > MAX_CHECKS:
                raise Undecided(f"not decided within {MAX_CHECKS} checks")
            return keyword(validator, value, instance, schema)

        return check


def _bounded(cls, counter: _Counter):
    keywords = dict(cls.VALIDATORS) | {"pattern": _pattern, "patternProperties": _pattern_properties}
    return extend(cls, {name: counter.counted(keyword) for name, keyword in keywords.items()})


def _pattern(validator, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not found_in(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator, patterns: dict[str, Any], instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object"):
        for pattern, subschema in patterns.items():
            for name, value in instance.items():
                if found_in(pattern, name):
                    yield from validator.descend(value, subschema, path=name, schema_path=pattern)


def found_in(pattern: str, text: str) -> bool:
    """Return whether a regular expression matches somewhere in a text, in time linear in the text.

    Raises Undecided when the pattern needs look-around or back-references.
    """
    matcher = _matcher(pattern).deep_copy()
    if matcher.is_error():
        raise Undecided(f"the pattern {pattern[:80]!r} needs what a linear matcher lacks")
    literal = json.dumps(text, ensure_ascii=False).encode("utf-8", errors="surrogatepass")
    return matcher.consume_tokens(list(literal)) and matcher.is_accepting()


@lru_cache(maxsize=512)
def _matcher(pattern: str) -> LLMatcher:
    # The compiler of schemas treats anchors as JSON Schema asks; that of plain regular expressions matches whole texts only.
    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern})
    return LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
