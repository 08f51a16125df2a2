"""Tool calls over HTTP, with the official client."""

import json

import pytest

MESSAGES = [{"role": "user", "content": "What is the weather in Tokyo?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
FIELDS = dict(model="tiny", messages=MESSAGES, tools=TOOLS, max_tokens=150, temperature=1.2)


def check_call(call):
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert set(arguments) == {"city", "days"} and 1 <= arguments["days"] <= 9
    else:
        assert call.function.name == "now" and arguments == {}


@pytest.fixture(scope="module")
def long_client(make_text_engine, start):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    with start(make_text_engine(max_seq_len=1024)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_well_formed(long_client, seed):
    choice = long_client.chat.completions.create(**FIELDS, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None and len(choice.message.tool_calls) == 1
    check_call(choice.message.tool_calls[0])


def test_a_named_call_is_of_that_tool(long_client):
    named = {"type": "function", "function": {"name": "now"}}
    choice = long_client.chat.completions.create(**FIELDS, tool_choice=named, seed=1).choices[0]
    assert choice.message.tool_calls[0].function.name == "now"


@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_streamed_calls_equal_the_whole_answers(long_client, choice, seed):
    fields = FIELDS | dict(tool_choice=choice, seed=seed, max_tokens=60, parallel_tool_calls=choice == "auto")
    whole = long_client.chat.completions.create(**fields).choices[0]
    content, calls, reason = "", [], None
    for chunk in long_client.chat.completions.create(**fields, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        calls += [(call.index, call.function.name, call.function.arguments) for call in delta.tool_calls or []]
        reason = chunk.choices[0].finish_reason or reason
    expected = [(i, call.function.name, call.function.arguments) for i, call in enumerate(whole.message.tool_calls or [])]
    assert (content, calls, reason) == (whole.message.content or "", expected, whole.finish_reason)


def test_tool_choice_none_calls_nothing(long_client):
    plain = long_client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, seed=4)
    none = long_client.chat.completions.create(**FIELDS | dict(tool_choice="none", max_tokens=20, temperature=1.0), seed=4)
    assert none.choices[0].message == plain.choices[0].message and none.usage == plain.usage


def test_results_go_back_into_the_conversation(long_client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Tokyo", "days": 1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = long_client.chat.completions.create(**FIELDS | dict(messages=messages, max_tokens=5))
    assert answer.usage.prompt_tokens > long_client.chat.completions.create(**FIELDS | dict(max_tokens=1)).usage.prompt_tokens


@pytest.mark.parametrize(("fields", "param"), [
    ({"tool_choice": "required", "tools": None}, "tool_choice"), ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "absent"}}}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"), ({"tools": [{"type": "web"}]}, "tools"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools"), ({"response_format": {"type": "json_object"}}, "tools"),
])  # fmt: skip
def test_refusals_name_the_field(long_client, fields, param):
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        long_client.chat.completions.create(**FIELDS | fields)
    assert str(caught.value.param).startswith(param)
