"""Schemas with valid and invalid documents, drawn in the proportions of those that are asked for in practice.

The kinds are MaskBench's (calls of functions, configuration files, records with references, mixed unions), and so is the share of
keywords that few compilers take. Documents are valid by the way they are drawn, invalid by one change; jsonschema has the last word.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import jsonschema

WORDS = "name city unit count price date owner tags items status kind address phone size color width height note url level".split()
FORMATS = {"date": "2024-02-29", "email": "ann@example.org", "uuid": "123e4567-e89b-12d3-a456-426614174000", "ipv4": "10.0.0.1"}
PATTERNS = {"^[A-Z]{2}[0-9]{4}$": "AB1234", "^[a-z]+(-[a-z]+)*$": "a-bc", "^v[0-9]+\\.[0-9]+$": "v1.20", "^#": "# x"}
# Out of a thousand schemas, how many have the keyword (from 683 of MaskBench's that were sampled earlier).
RARE = {"not": 63, "oneOf": 45, "dependentRequired": 20, "format": 19, "uniqueItems": 15, "if": 4, "minProperties": 3}


@dataclass(frozen=True)
class Case:
    """One schema and its documents."""

    kind: str
    """stratum that it was drawn from"""
    schema: Any
    """the schema"""
    documents: list[tuple[Any, bool]]
    """(document, whether it is valid)"""


def draw_cases(count: int, seed: int = 0) -> list[Case]:
    """Return schemas of all kinds in turn, each with documents that jsonschema judges as they are marked."""
    draw, cases = random.Random(seed), []
    kinds = ("function call", "flat record", "nested record", "references", "union")
    while len(cases) < count:
        kind = kinds[len(cases) % len(kinds)]
        schema, documents = _draw(draw, kind)
        judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        marked = [(document, judge.is_valid(document)) for document in documents]
        if any(valid for _, valid in marked) and not all(valid for _, valid in marked):
            cases.append(Case(kind, schema, marked))
    return cases


def _draw(draw: random.Random, kind: str) -> tuple[dict[str, Any], list[Any]]:
    depth = {"function call": 1, "flat record": 0, "nested record": 3, "references": 2, "union": 1}[kind]
    schema, make = _object(draw, depth, draw.randint(2, 8))
    if kind == "union":
        other, make_other = _object(draw, 1, 3)
        schema["properties"] |= {"kind": {"const": "a"}}
        other["properties"] |= {"kind": {"const": "b"}}
        for each in (schema, other):
            each["required"] = [*each["required"], "kind"] if "kind" not in each["required"] else each["required"]
        makes = [lambda: _in_order(schema, make() | {"kind": "a"}), lambda: _in_order(other, make_other() | {"kind": "b"})]
        top = {draw.choice(["anyOf", "anyOf", "oneOf"]): [schema, other]}
        return top, _documents(draw, [each() for each in makes])
    if kind == "references":
        inner, make_inner = _object(draw, 1, 3)
        top = {
            "type": "object",
            "properties": {"head": {"$ref": "#/$defs/node"}, "rest": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3}},
            "required": ["head"],
            "$defs": {"node": inner},
        }
        return top, _documents(draw, [{"head": make_inner(), "rest": [make_inner() for _ in range(draw.randint(0, 3))]} for _ in range(2)])
    if kind == "function call":
        top = {
            "type": "object",
            "properties": {"name": {"const": draw.choice(WORDS)}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        return top, _documents(draw, [{"name": top["properties"]["name"]["const"], "arguments": make()} for _ in range(2)])
    _make_rare(draw, schema)
    return schema, _documents(draw, [make() for _ in range(2)])


def _in_order(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in schema["properties"] if key in document}


def _make_rare(draw: random.Random, schema: dict[str, Any]) -> None:
    """Add, now and then, a keyword that is hard to enforce."""
    names = list(schema["properties"])
    for keyword, permille in RARE.items():
        if draw.randrange(1000) >= permille * 5 // 2:  # only two of five kinds pass here
            continue
        schema |= {
            "not": {"not": {"required": ["forbidden"]}},
            "oneOf": {"oneOf": [{"required": [names[0]]}, {"required": ["other"]}]},
            "dependentRequired": {"dependentRequired": {names[0]: [names[-1]]}},
            "format": {"properties": schema["properties"] | {"locale": {"type": "string", "format": "x-locale"}}},
            "uniqueItems": {"properties": schema["properties"] | {"set": {"type": "array", "uniqueItems": True}}},
            "if": {"if": {"required": [names[0]]}, "then": {"required": [names[-1]]}},
            "minProperties": {"minProperties": 1},
        }[keyword]


def _object(draw: random.Random, depth: int, width: int):
    """Return a schema of an object and a function that makes a document of it."""
    names = draw.sample(WORDS, width)
    members = {name: _value(draw, depth) for name in names}
    required = [name for name in names if draw.random() < 0.6] or names[:1]
    schema: dict[str, Any] = {"type": "object", "properties": {name: value for name, (value, _) in members.items()}, "required": required}
    if draw.random() < 0.5:
        schema["additionalProperties"] = False

    def make() -> dict[str, Any]:
        return {name: members[name][1]() for name in names if name in required or draw.random() < 0.5}

    return schema, make


def _value(draw: random.Random, depth: int):
    kind = draw.choice(["text", "text", "enum", "integer", "number", "boolean", "format", "pattern", "list", "nullable", "object"])
    if kind == "object" and depth > 0:
        return _object(draw, depth - 1, draw.randint(1, 4))
    if kind == "list":
        inner, make = _value(draw, depth - 1) if depth > 0 else ({"type": "string"}, lambda: "x")
        return {"type": "array", "items": inner, "minItems": 1, "maxItems": 4}, lambda: [make() for _ in range(draw.randint(1, 3))]
    if kind == "enum":
        values = draw.sample(WORDS, 4)
        return {"type": "string", "enum": values}, lambda: draw.choice(values)
    if kind == "format":
        name = draw.choice(list(FORMATS))
        return {"type": "string", "format": name}, lambda: FORMATS[name]
    if kind == "pattern":
        pattern = draw.choice(list(PATTERNS))
        return {"type": "string", "pattern": pattern}, lambda: PATTERNS[pattern]
    if kind == "integer":
        return {"type": "integer", "minimum": 0, "maximum": 500}, lambda: draw.randint(0, 500)
    simple = {
        "number": ({"type": "number", "exclusiveMinimum": -3}, lambda: round(draw.uniform(-2, 90), 2)),
        "boolean": ({"type": "boolean"}, lambda: draw.random() < 0.5),
        "nullable": ({"type": ["string", "null"], "maxLength": 20}, lambda: draw.choice([None, "some text"])),
    }
    return simple.get(
        kind, ({"type": "string", "description": "free text"}, lambda: " ".join(draw.sample(WORDS, 4)).capitalize() + " – é.")
    )


def _documents(draw: random.Random, valid: list[Any]) -> list[Any]:
    """Return documents and, for each, three with one thing changed."""
    return valid + [_changed(draw, document) for document in valid for _ in range(3)]


def _changed(draw: random.Random, document: Any) -> Any:
    if isinstance(document, dict) and document:
        key = draw.choice(list(document))
        how = draw.choice(["drop", "change", "change", "add"])
        if how == "drop":
            return {name: value for name, value in document.items() if name != key}
        if how == "add":
            return document | {"unexpected": 1}
        return document | {key: _changed(draw, document[key])}
    if isinstance(document, list):
        return [*document, *document, *document, *document] if draw.random() < 0.5 or not document else [_changed(draw, document[0])]
    return draw.choice([None, -999, "\u0001 not this", {"x": 1}, 3.75, True])
