"""Grammars by themselves: every walk that the masks allow ends in a text that an independent check accepts."""

import json
import random
import re

import numpy as np
import pytest

from plinth.config import UserError
from plinth.inference.grammar import Grammar
from plinth.inference.grammar_constraint import GrammarCompiler, GrammarWarning
from plinth.inference.json_validity import SchemaChecker

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1},
    },
    "required": ["day", "items"],
    "$defs": {
        "item": {"type": "object", "properties": {"a": {"type": "string", "minLength": 3}, "b": {"type": "number"}}, "required": ["a"]}
    },
}


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 13, (tokenizer.end_of_text_id, tokenizer.end_id))


def schema_checker(grammar: Grammar) -> SchemaChecker:
    return SchemaChecker(json.loads(grammar.source))


def allowed_ids(constraint) -> list[int]:
    return np.unpackbits(constraint.allowed(), bitorder="little").nonzero()[0].tolist()


def walk(compiler, grammar, max_tokens, seed, use_forced=True):
    """Draw tokens evenly among those allowed; returns the text, the tokens, whether it ended, and the constraint."""
    draw, constraint, tokens = random.Random(seed), compiler.start(grammar, max_tokens), []
    while len(tokens) < max_tokens:
        forced = constraint.forced()[: max_tokens - len(tokens)] if use_forced else []
        chosen = forced or [draw.choice(allowed_ids(constraint))]
        for token in chosen:
            if token in compiler.end_ids:
                return compiler.tokenizer.decode(tokens), tokens, True, constraint
            assert token in allowed_ids(constraint)
            constraint.advance(token)
            tokens.append(token)
        if constraint.finished():
            return compiler.tokenizer.decode(tokens), tokens, True, constraint
    return compiler.tokenizer.decode(tokens), tokens, False, constraint


@pytest.mark.parametrize("whitespace", ["bounded", "single", "none"])
@pytest.mark.parametrize("schema", [PERSON, NESTED, {"type": "object"}, {"type": ["array", "null"]}, True])
def test_whatever_is_drawn_from_a_schema_is_valid_when_it_ends(compiler, schema, whitespace):
    grammar, ended = Grammar.json_schema(schema, whitespace=whitespace), 0
    for seed in range(8):
        text, _, has_ended, constraint = walk(compiler, grammar, 400, seed)
        assert constraint.error is None
        if has_ended:
            ended += 1
            assert schema_checker(grammar).why_invalid(text) is None, text
            assert compiler.accepts(grammar, text)
        assert not re.search(r'[ \t\r\n]{9}(?=[^"]*("[^"]*"[^"]*)*$)', text) or '"' in text
    assert ended


def test_white_space_is_bounded_at_every_place(compiler, tokenizer):
    constraint = compiler.start(Grammar.json_object())
    for token in tokenizer.encode("{") + tokenizer.encode(" ") * 8:
        constraint.advance(token)
    spaces = [i for i in allowed_ids(constraint) if tokenizer.token_bytes(i).strip() == b"" and i not in compiler.end_ids]
    assert constraint.error is None and spaces == []


@pytest.mark.parametrize(
    "grammar, oracle",
    [
        (Grammar.regex(r"[a-c]{2,4}-[0-9]+"), re.compile(r"[a-c]{2,4}-[0-9]+")),
        (Grammar.choice(["yes", "no", "größer", 'a "b"\n']), re.compile('yes|no|größer|a "b"\n')),
        (Grammar.lark('start: NUMBER (("+" | "*") NUMBER)*\nNUMBER: /[0-9]{1,3}/'), re.compile(r"\d{1,3}([+*]\d{1,3})*")),
        (Grammar.gbnf('root ::= "x" item*\nitem ::= "a" | "b"'), re.compile("x[ab]*")),
    ],
)
def test_whatever_is_drawn_matches_an_independent_expression(compiler, grammar, oracle):
    for seed in range(20):
        text, _, has_ended, _ = walk(compiler, grammar, 60, seed)
        assert not has_ended or (oracle.fullmatch(text) and compiler.accepts(grammar, text))
    assert has_ended or grammar.kind == "lark"


def test_tokens_are_those_that_the_tokenizer_would_write_where_the_grammar_leaves_no_choice(compiler, tokenizer):
    schema = {"type": "object", "properties": {"function": {"const": "get_weather"}, "is": {"const": True}}, "required": ["function", "is"]}
    grammar = Grammar.json_schema({**schema, "additionalProperties": False}, whitespace="none")
    text, tokens, has_ended, _ = walk(compiler, grammar, 100, 0)
    assert has_ended and text == '{"function":"get_weather","is":true}'
    assert tokens == tokenizer.encode(text)


def test_forced_tokens_change_nothing_and_lead_to_the_same_state(compiler):
    constraint = compiler.start(Grammar.json_schema(PERSON, whitespace="none"))
    twin = constraint.copy()
    forced = constraint.forced()
    assert forced and forced == constraint.forced()
    for token in forced:
        assert token in allowed_ids(twin)
        twin.advance(token)
        constraint.advance(token)
    assert allowed_ids(twin) == allowed_ids(constraint)


def test_a_copy_moves_by_itself(compiler, tokenizer):
    first = compiler.start(Grammar.choice(["aa", "ab"]))
    second = first.copy()
    first.advance(tokenizer.encode("a")[0])
    assert allowed_ids(second) == allowed_ids(compiler.start(Grammar.choice(["aa", "ab"])))


def test_special_tokens_and_the_rest_of_a_padded_vocabulary_never_come(compiler, tokenizer):
    constraint = compiler.start(Grammar.regex("(?s:.*)"))
    ids = set(allowed_ids(constraint))
    assert ids & set(tokenizer.special_ids) == set(compiler.end_ids)
    assert max(ids) < tokenizer.vocab_size
    with pytest.raises(UserError, match="allows no text"):
        compiler.start(Grammar.lark("start: <|user|>"))
    spelled = walk(compiler, Grammar.choice(["<|user|>"]), 20, 0)
    assert spelled[0] == "<|user|>" and not set(spelled[1]) & set(tokenizer.special_ids)


def test_the_end_may_come_only_where_the_text_is_complete(compiler, tokenizer):
    constraint = compiler.start(Grammar.regex("ab+"))
    assert tokenizer.end_id not in allowed_ids(constraint)
    for token in tokenizer.encode("a") + tokenizer.encode("b"):
        constraint.advance(token)
    assert tokenizer.end_id in allowed_ids(constraint) and not constraint.finished()
    choice = compiler.start(Grammar.choice(["ab"]))
    for token in tokenizer.encode("ab"):
        choice.advance(token)
    assert choice.finished()


@pytest.mark.parametrize("whitespace", ["bounded", "single", "none"])
def test_a_document_is_closed_before_the_tokens_run_out(compiler, whitespace):
    grammar = Grammar.json_schema(PERSON, whitespace=whitespace)
    closed = 0
    for seed in range(15):
        text, tokens, has_ended, constraint = walk(compiler, grammar, 70, seed)
        assert has_ended and len(tokens) <= 70, text
        assert schema_checker(grammar).valid(text)
        closed += constraint.closed_early
    assert closed
    text, _, has_ended, _ = walk(compiler, grammar, 5, 0)
    assert not has_ended and not schema_checker(grammar).valid(text)


def test_a_token_that_is_not_allowed_ends_the_completion_with_its_reason(compiler, tokenizer):
    constraint = compiler.start(Grammar.choice(["yes"]))
    constraint.advance(tokenizer.encode("n")[0])
    assert constraint.finished() and "satisfy" in constraint.error
    assert allowed_ids(constraint) == sorted(compiler.end_ids)


def test_strict_mode_names_what_it_cannot_enforce(compiler):
    with pytest.raises(UserError, match="uniqueItems.*mode=.lenient"):
        compiler.compile(Grammar.json_schema({"type": "array", "uniqueItems": True}))
    with pytest.raises(UserError, match="Unknown format: iri"):
        compiler.compile(Grammar.json_schema({"type": "string", "format": "iri"}))


def test_lenient_mode_warns_of_what_it_ignores_and_the_result_is_validated(compiler):
    grammar = Grammar.json_schema({"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "maxItems": 2}, mode="lenient")
    with pytest.warns(GrammarWarning, match="uniqueItems"):
        compiled = compiler.compile(grammar)
    assert "uniqueItems" in compiled.warnings[0]
    assert compiler.accepts(grammar, "[1,1]") and not schema_checker(grammar).valid("[1,1]")
    assert compiler.compile(Grammar.json_schema(PERSON, mode="lenient")).warnings == ()


def test_a_count_may_be_written_as_a_whole_float(compiler):
    grammar = Grammar.json_schema({"type": "string", "maxLength": 2.0})
    assert compiler.accepts(grammar, '"ab"') and not compiler.accepts(grammar, '"abc"')


def test_a_schema_cannot_switch_the_bounds_off(compiler):
    loose = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True, "whitespace_pattern": r"\s+"}}
    with pytest.raises(UserError, match="uniqueItems"):
        compiler.compile(Grammar.json_schema(loose))


def test_compiled_grammars_are_kept(compiler):
    first = compiler.compile(Grammar.json_schema(PERSON))
    assert compiler.compile(Grammar.json_schema(json.dumps(PERSON))) is first


HOSTILE = {
    "nested list": lambda: Grammar.json_schema("[" * 100_000 + "]" * 100_000),
    "deep schema": lambda: Grammar.json_schema('{"items":' * 2_000 + "{}" + "}" * 2_000),
    "many properties": lambda: Grammar.json_schema({"properties": {f"p{i}": {} for i in range(100_000)}}),
    "long enum": lambda: Grammar.json_schema({"enum": [f"value {i}" for i in range(100_000)]}),
    "multiplying choices": lambda: Grammar.json_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}, "required": [f"p{i}{j}"]} for j in range(4)]} for i in range(14)
            ]
        }
    ),
    "nested brackets": lambda: Grammar.regex("(" * 50_000 + "a" + ")" * 50_000),
    "back-reference": lambda: Grammar.regex(r"(a+)\1"),
    "intersections that double": lambda: Grammar.json_schema({"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(1, 40)]}),
    "patterns of names": lambda: Grammar.json_schema({"patternProperties": {f"^a{i}b": {} for i in range(600)}}),
    "pairs of properties": lambda: Grammar.json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}),
    "look-ahead": lambda: Grammar.regex(r"(?=a)b"),
    "endless reference": lambda: Grammar.json_schema({"$ref": "#"}),
    "elsewhere": lambda: Grammar.json_schema({"$ref": "http://127.0.0.1:1/schema.json"}),
    "impossible": lambda: Grammar.json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    "not a number": lambda: Grammar.json_schema({"const": float("nan")}),
    "no rule": lambda: Grammar.lark("start: nothing"),
    "no grammar": lambda: Grammar.gbnf("root ::= ((("),
    "large grammar": lambda: Grammar.lark("start: " + '"a" ' * 400_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_answered_with_an_error(compiler, name):
    with pytest.raises(UserError):
        compiler.start(HOSTILE[name]())


@pytest.mark.parametrize("pattern", ["(a*)*b", "(x+x+)+y", "((a{1,100}){1,100}){1,100}", "(a|b)*a(a|b){1000}c", "[a-z]{1000000}"])
def test_expressions_that_would_explode_elsewhere_only_walk(compiler, pattern):
    text, _, _, constraint = walk(compiler, Grammar.regex(pattern), 40, 0)
    assert text and (constraint.error is None or constraint.finished())


@pytest.mark.parametrize("value", ["yes", [], [""], [1]])
def test_choices_are_texts(value):
    with pytest.raises(UserError, match="choice"):
        Grammar.choice(value)


def test_unknown_options_are_named():
    with pytest.raises(UserError, match="mode='loose' is not one of strict, lenient"):
        Grammar.json_schema({}, mode="loose")
    with pytest.raises(UserError, match="type list"):
        Grammar.json_schema([1])
