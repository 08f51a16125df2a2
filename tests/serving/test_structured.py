"""Structured output over HTTP: what was asked for, streamed and whole, in a batch, and what a cut-off answer says."""

import json

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "Name a file."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "file", "schema": SCHEMA, "strict": True}}


def chat(url, **fields):
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 1.2, "seed": 1, "max_tokens": 80, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


@pytest.mark.parametrize("seed", range(3))
def test_schema_is_kept_whole_and_streamed(base_url, seed):
    answer = chat(base_url, response_format=FORMAT, n=2, seed=seed).json()
    for choice in answer["choices"]:
        document = json.loads(choice["message"]["content"])
        assert set(document) == {"name", "size"} and 0 <= document["size"] <= 99
        assert choice["finish_reason"] == "stop" and choice["valid"] is True
    lines = chat(base_url, response_format=FORMAT, n=2, seed=seed, stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    for choice in answer["choices"]:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["delta"].get("content") or "" for chunk in mine) == choice["message"]["content"]
        assert mine[-1]["valid"] is True


def test_an_answer_that_is_cut_off_is_not_valid(base_url):
    schema = {"type": "string", "minLength": 200}
    choice = chat(base_url, max_tokens=10, structured_outputs={"json": schema}).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["valid"] is False
    stopped = chat(base_url, response_format=FORMAT, stop=['"size"']).json()["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["valid"] is False


def test_regex_choice_and_grammars(base_url):
    def content(**fields):
        choice = chat(base_url, structured_outputs=fields).json()["choices"][0]
        assert choice["valid"] is True
        return choice["message"]["content"]

    assert content(choice=["yes", "no"]) in ("yes", "no")
    assert content(regex="[ab]{3}-[0-9]{2}")[3] == "-"
    assert content(grammar='start: "x" ("," "x")~2') == "x,x,x"
    assert content(grammar='root ::= "left" | "right"') in ("left", "right")
    assert isinstance(json.loads(content(json={"type": "array", "items": {"type": "boolean"}, "maxItems": 2})), list)


def test_completions_take_it_too(base_url):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 20, "structured_outputs": {"choice": ["one", "two"]}, "logprobs": 1}
    choice = httpx.post(f"{base_url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert choice["text"] in ("one", "two") and choice["valid"] is True
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_json_object(base_url):
    choice = chat(base_url, response_format={"type": "json_object"}, max_tokens=60).json()["choices"][0]
    assert choice["valid"] is (choice["finish_reason"] == "stop")
    assert not choice["valid"] or isinstance(json.loads(choice["message"]["content"]), dict)


def test_what_lenient_mode_ignores_is_said(base_url):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "unevaluatedProperties": False}
    lenient = chat(base_url, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert lenient.status_code == 200 and "unevaluatedProperties" in lenient.headers.get("x-plinth-warning", "")
    strict = chat(base_url, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}})
    assert strict.status_code == 400 and "unevaluatedProperties" in strict.json()["error"]["message"]


def test_the_clients_parse_helper(client):
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("File", size=(int, pydantic.Field(ge=0, le=9)), is_open=(bool, ...))
    answer = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=model, max_tokens=80, seed=1)
    assert 0 <= answer.choices[0].message.parsed.size <= 9


DEEP = {"type": "string"}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize("fields", [
    {"structured_outputs": {}}, {"structured_outputs": {"json": {}, "regex": "a"}}, {"structured_outputs": {"regex": "(a"}},
    {"structured_outputs": {"regex": "(?=a)b"}},
    {"structured_outputs": {"grammar": "start: start"}}, {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"choice": []}}, {"structured_outputs": {"choice": ["", "x"]}}, {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"json": DEEP}}, {"structured_outputs": {"json": False}}, {"structured_outputs": {"unknown": 1}},
    {"structured_outputs": {"json": {"type": "no type"}}}, {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
    {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
], ids=lambda value: str(value)[:60])  # fmt: skip
def test_what_cannot_be_is_refused(base_url, fields):
    answer = chat(base_url, **fields)
    assert answer.status_code == 400 and len(answer.json()["error"]["message"]) < 800


@pytest.mark.parametrize("regex", ["(((((a{1,99}){1,99}){1,99}){1,99}){1,99})", "(a+)+b", "(a|a)*c", "(.*a){40}", "[ab]*a[ab]{60}"])
def test_an_exponential_expression_is_answered(base_url, regex):
    assert chat(base_url, structured_outputs={"regex": regex}, max_tokens=8).status_code in (200, 400)
    assert chat(base_url, max_tokens=2).status_code == 200


def test_a_hostile_schema_does_not_hold_up_the_others(base_url):
    branches = [{"properties": {f"k{i}": {"oneOf": [{"const": j} for j in range(40)]} for i in range(40)}} for _ in range(20)]
    answer = chat(base_url, structured_outputs={"json": {"anyOf": branches}})
    assert answer.status_code in (200, 400)
    assert chat(base_url, max_tokens=2).status_code == 200
