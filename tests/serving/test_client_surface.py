"""Every kind of answer, parsed by the official client's own types in pydantic's strict mode."""

import json

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "hello"}]
TOOLS = [
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}
]
COMPLETION = {"model": "tiny", "prompt": "def main", "max_tokens": 6, "seed": 1}
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "seed": 1}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "flag", "schema": {"type": "boolean"}, "strict": True}}


def strict(kind, value):
    """Parse an answer with nothing converted and, in the client's own fields, nothing missing."""
    parsed = kind.model_validate_json(json.dumps(value), strict=True)
    assert set(value) >= {name for name, field in kind.model_fields.items() if field.is_required()}
    return parsed


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture(scope="module")
def types():
    return pytest.importorskip("openai", reason="the openai client is not installed").types


@pytest.fixture(scope="module")
def ask(make_text_engine, start):
    with start(make_text_engine(max_seq_len=512)) as url:
        yield lambda path, body: httpx.post(f"{url}/v1/{path}", json=body, timeout=120)


@pytest.mark.parametrize("more", [
    {}, {"logprobs": 3}, {"echo": True, "logprobs": 1}, {"n": 3}, {"best_of": 3}, {"prompt": ["a", "b"]}, {"stop": ["e"]},
    {"structured_outputs": {"choice": ["a", "b"]}},
], ids=str)  # fmt: skip
def test_completions(ask, types, more):
    whole = ask("completions", COMPLETION | more).json()
    if "echo" in more:  # the client's types lack the null of the first token, which nothing predicts, though OpenAI sends it
        for name, filler in (("token_logprobs", 0.0), ("top_logprobs", {})):
            assert whole["choices"][0]["logprobs"][name][0] is None
            whole["choices"][0]["logprobs"][name][0] = filler
    answer = strict(types.Completion, whole)
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    if not {"best_of", "echo"} & set(more):
        for chunk in events(ask("completions", COMPLETION | more | {"stream": True, "stream_options": {"include_usage": True}})):
            if chunk["choices"] and chunk["choices"][0]["finish_reason"] is None:
                chunk["choices"][0]["finish_reason"] = "stop"  # the client's type has no null here, though OpenAI sends it
            strict(types.Completion, chunk)


@pytest.mark.parametrize("more", [
    {}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}, {"response_format": SCHEMA}, {"tools": TOOLS, "tool_choice": "required"},
    {"tools": TOOLS, "tool_choice": "auto", "logprobs": True}, {"max_completion_tokens": 60, "stop": "e"},
], ids=str)  # fmt: skip
def test_chats(ask, types, more):
    answer = strict(types.chat.ChatCompletion, ask("chat/completions", CHAT | more).json())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = events(ask("chat/completions", CHAT | more | {"stream": True, "stream_options": {"include_usage": True}}))
    assert strict(types.chat.ChatCompletionChunk, chunks[-1]).usage == answer.usage
    assert all(strict(types.chat.ChatCompletionChunk, chunk).usage is None for chunk in chunks[:-1])


def test_models_and_embeddings(ask, types, base_url):
    listed = httpx.get(f"{base_url}/v1/models").json()
    assert strict(types.Model, listed["data"][0]) == strict(types.Model, httpx.get(f"{base_url}/v1/models/tiny").json())
    body = {"model": "tiny", "input": ["a", "b"], "encoding_format": "float"}
    assert len(strict(types.CreateEmbeddingResponse, ask("embeddings", body).json()).data) == 2


def test_what_langchain_sends(ask):
    """Its recorded requests: nulls for defaults, a list of one prompt, base64 vectors, a strict schema, a named tool."""
    nulls = {"logprobs": None, "seed": None, "stop": None, "suffix": None, "logit_bias": None, "stream": False}
    legacy = {"prompt": ["x"], "best_of": 1, "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "top_p": 1, "temperature": 0.7}
    named = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}, "parallel_tool_calls": False}
    assert ask("completions", {"model": "tiny", "max_tokens": 4, **legacy, **nulls}).status_code == 200
    assert ask("chat/completions", CHAT | named | {"stream": False}).json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(ask("chat/completions", CHAT | {"response_format": SCHEMA}).json()["choices"][0]["message"]["content"]) in (
        True,
        False,
    )
    vector = ask("embeddings", {"model": "tiny", "input": ["x"], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert isinstance(vector, str)


def test_the_description_names_the_model_and_every_content_type(base_url):
    described = httpx.get(f"{base_url}/openapi.json").json()
    assert described["components"]["schemas"]["CompletionRequest"]["properties"]["model"]["enum"] == ["tiny"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = described["paths"][path]["post"]["responses"]
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"} and {"4XX", "5XX"} <= set(answers)
    assert set(described["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
