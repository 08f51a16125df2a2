"""The tokenizer over HTTP, as lm-eval's remote tokenizer reads it."""

import httpx
import pytest

from plinth.tokenizer.chat import render

TEXTS = ["def main(argv):", "東京 🙂", "", "<|end|> stays text", " leading"]


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(base_url, make_text_engine, text):
    answer = httpx.post(f"{base_url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert answer["tokens"] == make_text_engine().tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 128
    assert httpx.post(f"{base_url}/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_a_conversation_is_the_renderers(base_url, make_text_engine):
    messages = [{"role": "user", "content": "hello"}]
    tokenizer = make_text_engine().tokenizer
    for is_open in (True, False):
        body = {"model": "tiny", "messages": messages, "add_generation_prompt": is_open}
        expected = render(tokenizer, messages, add_generation_prompt=is_open).tokens
        assert httpx.post(f"{base_url}/tokenize", json=body).json()["tokens"] == expected
    text = httpx.post(f"{base_url}/detokenize", json={"tokens": expected}).json()["prompt"]
    assert text == "<|user|>hello<|end|>"


def test_names_of_tokens(base_url):
    answer = httpx.post(f"{base_url}/tokenize", json={"prompt": "🙂 x", "return_token_strs": True}).json()
    assert len(answer["token_strs"]) == answer["count"] and answer["token_strs"][-1].strip() == "x"


def test_the_tokenizers_settings(base_url):
    info = httpx.get(f"{base_url}/tokenizer_info").json()
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= set(info) and "<|assistant|>" in str(info["chat_template"])


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"promt": "x"}, "promt"), ("/tokenize", {"prompt": "x", "model": "gpt"}, "model"),
    ("/tokenize", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
    ("/detokenize", {"tokens": [400]}, "tokens"), ("/detokenize", {"tokens": ["x"]}, "tokens.0"), ("/detokenize", {}, "tokens"),
])  # fmt: skip
def test_refusals_name_the_field(base_url, path, body, param):
    answer = httpx.post(f"{base_url}{path}", json=body)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param
