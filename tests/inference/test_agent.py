"""The agent: calls that are always valid, bounded steps, tokens and context, a transcript, numbered sources."""

import json

import pyarrow.parquet as pq
import pytest

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.documents import Document, document_id, table_of
from plinth.inference.agent import AgentLimits, AgentTool, Observation, calculator_tool, run_agent, search_tool
from plinth.inference.engine import Engine
from plinth.inference.json_validity import SchemaChecker
from plinth.inference.retrieval import Found
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.text import TextEngine
from plinth.models.hub import save_model
from plinth.tokenizer.tool_format import CALL_START

CONTEXT = 2048
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def engine(make_model, tokenizer):
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT)
    return TextEngine(Engine(model, max_batch=1, eos_ids=(tokenizer.end_of_text_id, tokenizer.end_id)), tokenizer)


def found(source: str, text: str = "Whale oil burns.") -> Found:
    return Found(document_id(source), source, "text", "CC0-1.0", None, 1.0, 0, text, text)


def reads(*sources: Found) -> AgentTool:
    return AgentTool("look", "Read.", NUMBER, lambda arguments: Observation("", sources))


@pytest.mark.parametrize("seed", range(2))
def test_where_a_call_is_required_every_call_is_valid(engine, seed):
    tools = [calculator_tool(), search_tool(None), AgentTool("count", "Count.", NUMBER, lambda arguments: Observation("counted"))]
    tools[1] = AgentTool("search", tools[1].description, tools[1].parameters, lambda arguments: Observation("nothing found"))
    params = SamplingParams(temperature=1.0, seed=100 * seed)
    told = []
    limits = AgentLimits(max_steps=3, max_tokens=1000, max_turn_tokens=200)
    result = run_agent(engine, "What is 6 × 7?", tools, limits, params, choice="required", on_step=told.append)
    assert told == result.steps
    calls = [step for step in result.steps if step.call is not None]
    assert len(calls) == 3 and result.ended == "max_steps"
    for step in calls:
        schema = next(tool.parameters for tool in tools if tool.name == step.call)
        assert SchemaChecker(schema).why_invalid(json.dumps(step.arguments)) is None
        assert not step.text and step.observation
    assert result.steps[-1].call is None and result.answer == result.steps[-1].text
    assert result.num_tokens == sum(step.num_tokens for step in result.steps) <= 1000
    again = run_agent(engine, "What is 6 × 7?", tools, limits, params, choice="required")
    assert again == result


def test_a_named_tool_is_the_one_that_is_called(engine):
    tools = [calculator_tool(), AgentTool("count", "Count.", NUMBER, lambda arguments: Observation("counted"))]
    result = run_agent(engine, "How many?", tools, AgentLimits(max_steps=2), choice="count")
    assert [step.call for step in result.steps] == ["count", "count", None]


def test_without_steps_the_model_only_answers(engine):
    for tools, limits in (([calculator_tool()], AgentLimits(max_steps=0)), ([], AgentLimits())):
        result = run_agent(engine, "Hello?", tools, limits)
        assert len(result.steps) == 1 and result.ended == "max_steps" and not result.sources
        plain = engine.chat([[{"role": "user", "content": "Hello?"}]], SamplingParams(temperature=0.0, max_tokens=limits.max_turn_tokens))[
            0
        ]
        assert run_agent(engine, "Hello?", tools, limits, system=None).answer == plain.text


def test_a_free_model_may_answer_at_once_or_call(engine):
    for seed in range(2):
        result = run_agent(engine, "Hello?", [calculator_tool()], params=SamplingParams(seed=seed))
        assert result.ended in ("answer", "max_steps", "max_tokens", "unfinished call")
        assert all(step.call == "calculator" or step is result.steps[-1] or CALL_START in step.text for step in result.steps)


def test_what_a_tool_refuses_is_told_and_the_loop_goes_on(engine):
    def refuse(arguments):
        raise UserError("n is too large.")

    result = run_agent(engine, "?", [AgentTool("count", "Count.", NUMBER, refuse)], AgentLimits(max_steps=2), choice="required")
    assert [step.observation for step in result.steps] == ["error: n is too large."] * 2 + [None]


def test_sources_are_numbered_once_and_named(engine):
    looks = iter([(found("a.txt"), found("b.txt")), (found("b.txt"), found("c.txt"))])
    tool = AgentTool("look", "Read.", NUMBER, lambda arguments: Observation("", next(looks)))
    result = run_agent(engine, "?", [tool], AgentLimits(max_steps=2), choice="required")
    assert [(source.number, source.source, source.licence) for source in result.sources] == [
        (1, "a.txt", "CC0-1.0"),
        (2, "b.txt", "CC0-1.0"),
        (3, "c.txt", "CC0-1.0"),
    ]
    assert result.steps[0].observation == "[1] a.txt: Whale oil burns.\n[2] b.txt: Whale oil burns."
    assert result.steps[1].observation == "[2] b.txt: Whale oil burns.\n[3] c.txt: Whale oil burns."
    assert [source.cited for source in result.sources] == [f"[{number}]" in result.answer for number in (1, 2, 3)]


def test_a_long_result_is_cut_to_the_context_and_unread_sources_are_not_named(engine):
    tool = reads(found("a.txt", "oil " * 900), found("b.txt", "oil " * 900))
    result = run_agent(engine, "?", [tool], AgentLimits(max_steps=3), choice="required")
    assert [source.source for source in result.sources] == ["a.txt"]
    assert result.steps[0].observation.endswith(" …") and len(result.steps[0].observation) > 100
    assert result.ended == "context" and result.steps[-1].call is None


def test_tokens_are_bounded_and_the_last_turn_is_the_answers(engine):
    result = run_agent(engine, "?", [reads()], AgentLimits(max_steps=50, max_tokens=150, max_turn_tokens=60), choice="required")
    assert result.ended == "max_tokens" and result.num_tokens <= 150
    assert result.steps[-1].call is None and len(result.steps) > 1


def test_a_call_that_is_cut_off_is_said(engine):
    limits = AgentLimits(max_steps=3, max_tokens=100, max_turn_tokens=8)
    result = run_agent(engine, "?", [calculator_tool()], limits, choice="required")
    assert result.ended == "unfinished call" and result.steps[0].observation == "error: the call was cut off"
    assert len(result.steps) == 2 and CALL_START not in result.answer


def test_mistakes_are_named(engine):
    with pytest.raises(UserError, match="max_steps=-1"):
        AgentLimits(max_steps=-1)
    with pytest.raises(UserError, match="max_turn_tokens=9 .* max_tokens=8"):
        AgentLimits(max_tokens=8, max_turn_tokens=9)
    with pytest.raises(UserError, match=f"the context holds {CONTEXT}"):
        run_agent(engine, "why " * 1000, [calculator_tool()])
    with pytest.raises(UserError, match="tool_choice='calculater'.*Did you mean calculator"):
        run_agent(engine, "?", [calculator_tool()], choice="calculater")


@pytest.fixture(scope="module")
def build(make_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    (folder / "sft").mkdir()
    (folder / "sft" / "DONE").write_text("{}")
    save_model(make_model(vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT), tokenizer, folder / "sft" / "model")
    (folder / "corpus").mkdir()
    text = "e a 0 1 2 3 4 5 6 7 8 9"  # words that a query drawn at random may hold
    pq.write_table(table_of([Document(text, "digits.txt", licence="CC0-1.0")]), folder / "corpus" / "train.parquet")
    return folder


def test_the_verb(build, capsys):
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    argv = ["agent", str(build), "What is 6 × 7?", "--call", "--max-steps", "2", "--max-tokens", "600", "--max-turn-tokens", "200"]
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [step["call"] is None for step in result["steps"]] == [False, False, True] and result["ended"] == "max_steps"
    assert all(f"{step['call']}(" in captured.err for step in result["steps"][:2])
    assert main([*argv, "--tools", "calculator"]) == 0
    assert "calculator(expression=" in capsys.readouterr().err
    assert main([*argv, "--max-steps", "-1"]) == 1
    assert "max_steps=-1" in capsys.readouterr().err
