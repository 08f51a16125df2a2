"""Every refusal is OpenAI's error object, with the right status and the name of the field."""

import httpx
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]

REFUSED = [
    (COMPLETIONS, {"temperature": -1}, "temperature", "greater than or equal to 0"),
    (COMPLETIONS, {"temperature": "hot"}, "temperature", "hot"),
    (COMPLETIONS, {"top_p": 0}, "top_p", "greater than 0"),
    (COMPLETIONS, {"n": 0}, "n", "greater than or equal to 1"),
    (COMPLETIONS, {"n": 129}, "n", "less than or equal to 128"),
    (COMPLETIONS, {"n": 100}, "n", "100 sequences"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "echo"),
    (COMPLETIONS, {"max_tokens": 10_000}, "max_tokens", "context of 128"),
    (COMPLETIONS, {"max_tokens": True}, "max_tokens", "True"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs", "20"),
    (COMPLETIONS, {"seed": 2**63}, "seed", "less than"),
    (COMPLETIONS, {"stop": list("abcde")}, "stop", "at most 4"),
    (COMPLETIONS, {"stop": ""}, "stop", "a string"),
    (COMPLETIONS, {"stop": [1]}, "stop", "a string"),
    (COMPLETIONS, {"prompt": 3}, "prompt", "a list of token ids"),
    (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [400]}, "prompt", "0 to 399"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "0 to 399"),
    (COMPLETIONS, {"prompt": "word " * 500}, "prompt", "Shorten"),
    (COMPLETIONS, {"suffix": "end"}, "suffix", "not supported"),
    (COMPLETIONS, {"use_beam_search": True}, "use_beam_search", "not supported"),
    (COMPLETIONS, {"guided_json": {}}, "guided_json", "Use structured_outputs"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "Use tools"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    (COMPLETIONS, {"temprature": 1}, "temprature", "Did you mean temperature?"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "missing"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0", "robot"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "image_url"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a string"),
    (CHAT, {"messages": "hello"}, "messages", "list"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
    (CHAT, {"logprobs": 3}, "logprobs", "bool"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "differ"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
]


@pytest.mark.parametrize(("path", "fields", "param", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_field(base_url, path, fields, param, says):
    body = {"model": "tiny", **({"messages": MESSAGES} if path == CHAT else {"prompt": "hello"}), **fields}
    answer = httpx.post(f"{base_url}{path}", content=to_json(body), headers={"Content-Type": "application/json"}, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert says in error["message"] and len(error["message"]) < 300


def to_json(body) -> bytes:
    import json

    return json.dumps(body).encode()  # unlike httpx's own, this spells half a surrogate pair as JSON can


def test_missing_fields(base_url):
    answer = httpx.post(f"{base_url}{CHAT}", json={"model": "tiny"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    answer = httpx.post(f"{base_url}{CHAT}", json={"messages": MESSAGES})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"model": "tiny", "prompt": NaN}'])
def test_bodies_that_are_no_requests(base_url, content):
    answer = httpx.post(f"{base_url}{COMPLETIONS}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_not_finite_numbers_are_refused(base_url):
    for value in ("NaN", "Infinity", "1e999"):
        body = f'{{"model": "tiny", "prompt": "x", "temperature": {value}}}'
        answer = httpx.post(f"{base_url}{COMPLETIONS}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"


def test_unknown_model_names_the_known_one(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="Known: tiny") as caught:
        client.completions.create(model="gpt-4o", prompt="x")
    assert caught.value.status_code == 404 and caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_unknown_address_and_method(base_url):
    missing = httpx.get(f"{base_url}/v2/chat")
    assert missing.status_code == 404 and "/v1/completions" in missing.json()["error"]["message"]
    assert httpx.get(f"{base_url}{CHAT}").status_code == 405
    assert "error" in httpx.get(f"{base_url}{CHAT}").json()


def test_body_of_more_than_the_limit(base_url):
    answer = httpx.post(f"{base_url}{COMPLETIONS}", content=b" " * (9 * 2**20), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "8388608 bytes" in answer.json()["error"]["message"]


def test_a_failing_engine_is_a_500_and_the_server_goes_on(make_text_engine, start):
    text_engine = make_text_engine()
    body = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 4}
    with start(text_engine) as url:
        before = httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=60).json()["choices"]
        weight = text_engine.engine.runner.model.embed.weight
        whole, weight.data = weight.data, weight.data[:1]
        broken = httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=60)
        streamed = httpx.post(f"{url}{COMPLETIONS}", json=body | {"stream": True}, timeout=60)
        weight.data = whole
        after = httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=60).json()["choices"]
    assert broken.status_code == 500 and broken.json()["error"]["type"] == "server_error"
    assert '"error"' in streamed.text and "[DONE]" not in streamed.text
    assert after == before
