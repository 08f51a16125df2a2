"""Whether a JSON Schema is one at all: the form of every keyword's value, in one pass.

The metaschemas say the same, but validating a large schema against them takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from plinth.config import UserError

MAX_DEPTH = 60  # of a schema's lists and objects; the compiler's own bound is a little higher
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return is_number(value) and value >= 0 and value == int(value)


def is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def is_schema_map(value: Any) -> bool:
    return isinstance(value, dict) and all(is_schema(child) for child in value.values())


def is_schema_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_schema(child) for child in value)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(child, str) for child in value)


def is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def is_limit(value: Any) -> bool:
    return is_number(value) or isinstance(value, bool)  # draft 4 has booleans here


def is_schema_or_list(value: Any) -> bool:
    return is_schema(value) or (isinstance(value, list) and all(is_schema(child) for child in value))  # a list up to draft 2019-09


def is_dependencies(value: Any) -> bool:
    return isinstance(value, dict) and all(is_schema(child) or is_texts(child) for child in value.values())


Rule = tuple[Callable[[Any], bool], str]
TEXT: Rule = (lambda value: isinstance(value, str), "a text")
COUNT: Rule = (is_count, "a whole number of 0 or more")
NUMBER: Rule = (is_number, "a number")
LIMIT: Rule = (is_limit, "a number")
SCHEMA: Rule = (is_schema, "a schema (an object or a boolean)")
SCHEMA_MAP: Rule = (is_schema_map, "an object of schemas")
SCHEMA_LIST: Rule = (is_schema_list, "a list of at least one schema")
FORMS: dict[str, Rule] = {
    "type": (is_type, f"one or several of {', '.join(TYPES)}"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "required": (lambda value: is_texts(value) or isinstance(value, bool), "a list of texts"),
    "dependentRequired": (lambda value: isinstance(value, dict) and all(map(is_texts, value.values())), "an object of lists of texts"),
    "dependencies": (is_dependencies, "an object of schemas or of lists of texts"),
    "items": (is_schema_or_list, "a schema"),
    "multipleOf": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "uniqueItems": (lambda value: isinstance(value, bool), "a boolean"),
    **dict.fromkeys(("$ref", "$dynamicRef", "$schema", "$id", "$anchor", "pattern", "format"), TEXT),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), COUNT),
    **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), COUNT),
    **dict.fromkeys(("minimum", "maximum"), NUMBER),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), LIMIT),
    **dict.fromkeys(("not", "if", "then", "else", "contains", "propertyNames", "additionalProperties", "additionalItems"), SCHEMA),
    **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), SCHEMA),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), SCHEMA_MAP),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), SCHEMA_LIST),
}
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SINGLE = ("not", "if", "then", "else", "contains", "propertyNames", "additionalProperties", "additionalItems", "items")
SINGLE += ("unevaluatedProperties", "unevaluatedItems")


def check_schema(schema: Any) -> None:
    """Raise UserError, with the place, when a keyword has a value of the wrong form or the nesting is too deep."""
    level = [("", schema)]
    check_depth(schema)
    while level:
        level = [child for path, node in level if isinstance(node, dict) for child in _check_node(path, node)]


def _check_node(path: str, node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword, value in node.items():
        rule = FORMS.get(keyword)
        if rule is not None and not rule[0](value):
            shown = repr(value)[:60]
            raise UserError(f"json_schema: {path}/{keyword}={shown} is not {rule[1]}.")
        if keyword in MAPS:
            yield from ((f"{path}/{keyword}/{name}", child) for name, child in value.items())
        elif keyword in LISTS and isinstance(value, list):
            yield from ((f"{path}/{keyword}/{i}", child) for i, child in enumerate(value))
        elif keyword in SINGLE:
            yield f"{path}/{keyword}", value


def check_depth(schema: Any) -> None:
    """Raise UserError when lists and objects lie in one another more than MAX_DEPTH levels deep."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"json_schema is nested deeper than {MAX_DEPTH} levels. Use $defs and $ref for what repeats.")
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]


def whole_numbers(schema: Any) -> Any:
    """Return a schema whose counts are integers, where JSON allows 2.0 too and the compiler does not."""
    if isinstance(schema, list):
        return [whole_numbers(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: int(value) if isinstance(value, float) and FORMS.get(key) is COUNT else whole_numbers(value) for key, value in schema.items()
    }
