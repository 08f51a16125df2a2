"""Grammars within the engine: what comes out is valid or says why not, in batches, streams and beside other requests."""

import json
import re

import pytest

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.grammar import Grammar
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextEngine
from plinth.inference.tool_calls import parse_answer, tool_grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
GRAMMAR = Grammar.json_schema(SCHEMA, whitespace="none")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}]
PROMPTS = ["def main", "Größe", "return 0", "café"]


def hot(max_tokens: int = 90, **options) -> SamplingParams:
    return SamplingParams(**({"temperature": 1.5, "max_tokens": max_tokens, "seed": 3} | options))


def test_every_completion_is_valid_and_the_model_still_chooses(text_engine):
    completions = text_engine.complete(PROMPTS * 2, hot(), GRAMMAR)
    assert all(completion.valid and completion.finish_reason == "stop" for completion in completions)
    assert all(set(json.loads(completion.text)) == {"name", "kind", "sizes"} for completion in completions)
    assert len({completion.text for completion in completions}) > 4


def test_a_constrained_request_is_the_same_alone_and_in_company(text_engine):
    together = text_engine.complete(PROMPTS, [hot(seed=i) for i in range(4)], [GRAMMAR, None, Grammar.regex("[a-f]{3,9}"), None])
    for i, grammar in enumerate([GRAMMAR, None, Grammar.regex("[a-f]{3,9}"), None]):
        assert text_engine.complete([PROMPTS[i]], hot(seed=i), grammar) == [together[i]]
    assert [completion.valid for completion in together] == [True, None, True, None]


def test_a_stream_joins_to_the_completion_and_says_at_its_end_whether_it_is_valid(text_engine):
    whole = text_engine.complete(["def"], hot(), GRAMMAR)[0]
    deltas = list(text_engine.stream("def", hot(), GRAMMAR))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.tokens] == whole.tokens
    assert deltas[-1].valid is True and all(delta.valid is None for delta in deltas[:-1])


def test_log_probabilities_stay_those_of_the_model(text_engine):
    completion = text_engine.complete(["def"], hot(logprobs=2), GRAMMAR)[0]
    scored = text_engine.engine.score([text_engine.encode("def") + completion.tokens])[0][-len(completion.tokens) :]
    assert completion.logprobs == pytest.approx(scored, abs=1e-3)


def test_forced_tokens_are_not_drawn_and_change_nothing(text_engine):
    before = text_engine.engine.counters.forced_tokens
    grammar = Grammar.json_schema({"const": {"a long name of one thing": 1}}, whitespace="none")
    completion = text_engine.complete(["x"], hot(), grammar)[0]
    assert completion.text == '{"a long name of one thing":1}' and completion.valid
    assert text_engine.engine.counters.forced_tokens - before >= len(completion.tokens) - 2
    assert completion.tokens == text_engine.tokenizer.encode(completion.text)


def test_a_document_is_closed_when_the_tokens_run_out(text_engine):
    completions = text_engine.complete(PROMPTS, hot(60), GRAMMAR)
    assert all(completion.valid and len(completion.tokens) <= 60 for completion in completions)
    assert any(completion.closed_early for completion in completions)


def test_a_cut_off_document_says_so(text_engine):
    completion = text_engine.complete(["def"], hot(8), GRAMMAR)[0]
    assert completion.finish_reason == "length" and completion.valid is False and completion.why_invalid == "cut off by length"
    digits = text_engine.complete(["def"], hot(3), Grammar.regex("[0-9]+"))[0]
    assert digits.finish_reason == "stop" or digits.valid is False


def test_a_stop_string_within_a_document_leaves_it_invalid(text_engine):
    completion = text_engine.complete(["def"], hot(stop=('"kind"',)), GRAMMAR)[0]
    assert completion.finish_reason == "stop" and completion.valid is False and "not JSON" in completion.why_invalid
    late = text_engine.complete(["def"], hot(stop=("never",)), GRAMMAR)[0]
    assert late.valid


def test_what_lenient_mode_ignored_is_found_at_the_end(text_engine):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 4, "maxItems": 4, "uniqueItems": True}
    with pytest.warns(UserWarning, match="uniqueItems"):
        completion = text_engine.complete(["def"], hot(), Grammar.json_schema(schema, mode="lenient", whitespace="none"))[0]
    assert completion.finish_reason == "stop" and completion.valid is False and "non-unique" in completion.why_invalid


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.regex("[a-c]{2}-[0-9]{1,3}"), "[a-c]{2}-[0-9]{1,3}"),
        (Grammar.choice(["yes", "no", "naïve"]), "yes|no|naïve"),
        (Grammar.lark('start: "(" start ")" | "x"'), r"\(*x\)*"),
    ],
)
def test_other_grammars(text_engine, grammar, pattern):
    for completion in text_engine.complete(PROMPTS, hot(40), grammar):
        assert completion.valid == (completion.finish_reason == "stop")
        assert not completion.valid or re.fullmatch(pattern, completion.text)


def test_calls_of_tools_in_a_chat(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=1024)
    text_engine = TextEngine(Engine(model, max_batch=2, eos_ids=(tokenizer.end_id,)), tokenizer)
    messages = [{"role": "user", "content": "look"}]
    completion = text_engine.chat([messages], hot(120), tool_grammar(TOOLS, parallel=False), TOOLS)[0]
    content, calls = parse_answer(completion.text, ["look"])
    assert completion.valid and content == "" and [call.name for call in calls] == ["look"]
    deltas = list(text_engine.stream_chat(messages, hot(120), tool_grammar(TOOLS, parallel=False), TOOLS))
    assert "".join(delta.text for delta in deltas) == completion.text


def test_a_grammar_that_fails_leaves_no_request_behind(text_engine):
    with pytest.raises(UserError, match="uniqueItems"):
        text_engine.complete(PROMPTS, hot(), [None, None, None, Grammar.json_schema({"uniqueItems": True})])
    assert text_engine.engine.num_active == 0
    with pytest.raises(UserError, match="2 grammars for 4 prompts"):
        text_engine.complete(PROMPTS, hot(), [None, None])
