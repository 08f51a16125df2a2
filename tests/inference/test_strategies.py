import json

import pytest

from plinth.config import UserError
from plinth.inference.grammar import Grammar
from plinth.inference.sampling import SamplingParams
from plinth.inference.strategies import ask, ask_and_repair, constrain, retry, schema_prompt

GRAMMAR = Grammar.json_schema({"type": "integer"}, whitespace="none")
PROMPTS = ["def", "return 0", "café"]
PARAMS = SamplingParams(temperature=1.5, max_tokens=6, seed=4)


def test_asking_takes_the_text_as_it_is(text_engine):
    completions = text_engine.complete(PROMPTS, PARAMS)
    assert [each.text for each in ask(text_engine, PROMPTS, GRAMMAR, PARAMS)] == [completion.text for completion in completions]
    mended = ask_and_repair(text_engine, PROMPTS, Grammar.json_schema({"type": "array"}), PARAMS)
    assert all(each.valid == bool(each.text.startswith("[") and json.loads(each.text) is not None) for each in mended)


def test_retrying_counts_what_it_spends_and_stops_at_the_first_valid_document(text_engine):
    anything = Grammar.json_schema({"type": ["object", "array", "integer"]})
    results = retry(text_engine, PROMPTS, anything, PARAMS, 4, repair=True)
    for i, result in enumerate(results):
        assert result.valid or result.attempts == 4
        alone = [text_engine.complete([PROMPTS[i]], SamplingParams(temperature=1.5, max_tokens=6, seed=4 + i + 3 * k))[0] for k in range(4)]
        assert result.completion_tokens == sum(len(completion.tokens) for completion in alone[: result.attempts])
    with pytest.raises(UserError, match="temperature=0"):
        retry(text_engine, PROMPTS, anything, SamplingParams(temperature=0))


def test_constraining_is_valid_at_once(text_engine):
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 3}
    results = constrain(text_engine, PROMPTS, Grammar.json_schema(schema, whitespace="none"), SamplingParams(max_tokens=60, seed=1))
    assert all(result.valid and result.attempts == 1 for result in results)


def test_the_prompt_holds_the_schema_and_other_grammars_have_none():
    assert '{"type": "integer"}' in schema_prompt("How many?", {"type": "integer"})
    with pytest.raises(UserError, match="kind regex has no schema"):
        ask(None, [], Grammar.regex("a"), PARAMS)
