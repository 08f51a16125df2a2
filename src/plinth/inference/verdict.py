"""Whether a finished completion is what its grammar asked for, judged apart from the grammar that led it."""

from __future__ import annotations

import json
from functools import lru_cache

from plinth.inference.grammar import Grammar
from plinth.inference.grammar_constraint import GrammarCompiler
from plinth.inference.json_validity import SchemaChecker
from plinth.inference.tool_calls import parse_answer


def why_invalid(compiler: GrammarCompiler, grammar: Grammar, text: str, finish_reason: str) -> str | None:
    """Return what is wrong with a completion, or None. One that was cut off is never valid, whatever its text.

    JSON and the arguments of calls are judged by jsonschema, so that what lenient mode ignored is found; the rest by the grammar.
    """
    if finish_reason != "stop":
        return f"cut off by {finish_reason}"
    if grammar.kind == "json_schema":
        return _checkers(grammar)[0].why_invalid(text)
    if grammar.kind == "tools":
        return _why_calls_invalid(grammar, text)
    return None if compiler.accepts(grammar, text) else f"not a text of the {grammar.kind}"


def _why_calls_invalid(grammar: Grammar, text: str) -> str | None:
    content, calls = parse_answer(text)
    source = json.loads(grammar.source)
    if not source["auto"] and (content or not calls):
        return "not a call of a tool"
    for call in calls:
        document = json.dumps({"name": call.name, "arguments": json.loads(call.arguments)})
        reasons = [checker.why_invalid(document) for checker in _checkers(grammar)]
        if None not in reasons:
            return f"call of {call.name}: {min(map(str, reasons), key=len)}"
    return None


@lru_cache(maxsize=64)
def _checkers(grammar: Grammar) -> tuple[SchemaChecker, ...]:
    source = json.loads(grammar.source)
    return tuple(map(SchemaChecker, source["schemas"])) if grammar.kind == "tools" else (SchemaChecker(source),)
