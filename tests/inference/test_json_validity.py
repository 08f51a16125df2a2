import json

import pytest

from plinth.config import UserError
from plinth.inference.json_validity import MAX_CHECKS, SchemaChecker, found_in
from plinth.inference.schema_form import check_schema

EVENT = {
    "type": "object",
    "properties": {"day": {"type": "string", "format": "date"}, "name": {"$ref": "#/$defs/name"}},
    "patternProperties": {"^x-": {"type": "integer"}},
    "required": ["day"],
    "$defs": {"name": {"type": "string", "pattern": "^[A-Z][a-z]+$"}},
}


@pytest.mark.parametrize(
    "text, wrong",
    [
        ('{"day": "2020-02-29"}', None),
        ('{"day": "2020-02-29", "name": "Ann", "x-n": 3}', None),
        ('{"day": "2021-02-29"}', "day: .*date"),
        ('{"day": "2020-02-29", "name": "ann"}', "name: .*match"),
        ('{"day": "2020-02-29", "x-n": "3"}', "x-n: .*integer"),
        ('{"name": "Ann"}', "'day' is a required"),
        ('{"day": NaN}', "not JSON: NaN"),
        ('{"day": "2020-02-29"', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_wrong_is_said(text, wrong):
    reason = SchemaChecker(EVENT).why_invalid(text)
    assert reason is None if wrong is None else reason and __import__("re").search(wrong, reason)


def test_a_pattern_is_searched_for_and_its_anchors_hold():
    assert found_in("b+", "abc") and not found_in("^b+", "abc") and found_in("^a.*c$", "abc")
    assert found_in('"\\n', 'say "\nno') and found_in("ö", "Größe")


def test_hostile_schemas_cost_a_bounded_number_of_checks():
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"type": "string"}}
    assert SchemaChecker({"$defs": doubling, "$ref": "#/$defs/d0"}).why_invalid('"x"') == f"not decided within {MAX_CHECKS} checks"
    assert SchemaChecker({"$ref": "#"}).why_invalid('"x"') is not None
    assert not SchemaChecker({"pattern": "^(x+x+)+y$"}).valid(json.dumps("x" * 5_000))


def test_nothing_is_fetched_and_what_cannot_be_decided_is_not_valid():
    assert "does not hold" in SchemaChecker({"$ref": "http://127.0.0.1:1/schema.json"}).why_invalid("1")
    assert "linear" in SchemaChecker({"pattern": "^(?!a)"}).why_invalid('"b"')


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "objekt"}, "/type='objekt' is not one or several of"),
        ({"properties": {"a": 3}}, "/properties=.* is not an object of schemas"),
        ({"properties": {"a": {"items": {"minLength": -1}}}}, "/properties/a/items/minLength=-1 is not a whole number"),
        ({"anyOf": []}, "/anyOf=.* is not a list of at least one schema"),
        ({"required": "name"}, "/required='name' is not a list of texts"),
        ({"minimum": "2"}, "/minimum='2' is not a number"),
        ({"multipleOf": 0}, "/multipleOf=0 is not a number above 0"),
        ({"dependentRequired": {"a": "b"}}, "/dependentRequired=.* lists of texts"),
    ],
)
def test_a_malformed_schema_is_refused_with_its_place(schema, message):
    with pytest.raises(UserError, match=message):
        check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"enum": [], "const": {"type": "objekt"}, "default": {"properties": 3}, "x-anything": {"minLength": -1}},
        {"properties": {"type": {"type": "string"}, "enum": False}},
        {"items": [{"type": "string"}], "additionalItems": False, "exclusiveMinimum": True, "minimum": 3},
        {"dependencies": {"a": ["b"], "c": {"required": ["d"]}}, "maxLength": 2.0},
    ],
)
def test_schemas_of_every_draft_pass(schema):
    check_schema(schema)
