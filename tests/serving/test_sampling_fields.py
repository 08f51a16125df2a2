"""The fields that change the choice of tokens: each does what its closed form says, and is refused where it cannot."""

import math

import httpx
import pytest

PROMPT = "def main(argv):"
FIELDS = dict(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=5)


def complete(client, **fields):
    extra = {name: fields.pop(name) for name in list(fields) if name in EXTRAS}
    return client.completions.create(**FIELDS | fields, extra_body=extra).choices[0]


EXTRAS = ("typical_p", "repetition_penalty", "allowed_token_ids", "min_tokens", "ignore_eos", "stop_token_ids", "prompt_logprobs")


@pytest.fixture(scope="module")
def tokenizer(make_text_engine):
    return make_text_engine().tokenizer


def test_bias_makes_and_forbids_a_token(client, tokenizer):
    token = tokenizer.encode("x")[0]
    assert complete(client, logit_bias={str(token): 100}).text == "x" * 12
    first = complete(client).logprobs.tokens[0]
    banned = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == first.encode())
    assert complete(client, logit_bias={str(banned): -100}).logprobs.tokens[0] != first


def test_reported_logprobs_stay_the_models_own(client):
    plain, biased = complete(client, max_tokens=1), complete(client, max_tokens=1, logit_bias={"50": 100})
    assert biased.logprobs.token_logprobs[0] < plain.logprobs.token_logprobs[0]
    assert all(plain.logprobs.top_logprobs[0][name] == value for name, value in list(biased.logprobs.top_logprobs[0].items())[:5])


def test_allowed_token_ids_are_the_only_ones(client, tokenizer):
    ids = tokenizer.encode("ab")
    assert set(complete(client, allowed_token_ids=ids, temperature=2.0).text) <= set("ab")


def test_min_tokens_and_ignore_eos(client, tokenizer):
    fields = dict(logit_bias={str(tokenizer.end_id): 100}, logprobs=None)
    assert complete(client, **fields).text == ""
    several = client.completions.create(**FIELDS | fields, extra_body={"min_tokens": 4})
    assert several.usage.completion_tokens == 5 and several.choices[0].finish_reason == "stop"
    endless = client.completions.create(**FIELDS | fields, extra_body={"ignore_eos": True})
    assert endless.usage.completion_tokens == 12 and endless.choices[0].finish_reason == "length"


def test_penalties_forbid_what_has_come(client):
    fields = dict(max_tokens=40, temperature=0)
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 50.0}):
        assert complete(client, **fields, **penalty).text != complete(client, **fields).text
    tokens = complete(client, max_tokens=20, repetition_penalty=100.0).logprobs.tokens
    assert len(set(tokens)) == len(tokens)


def test_neutral_values_change_nothing(client):
    neutral = dict(presence_penalty=0, frequency_penalty=0, repetition_penalty=1.0, logit_bias={}, min_tokens=0, ignore_eos=False,
                   typical_p=1.0)  # fmt: skip
    fields = dict(temperature=1.3, seed=5)
    assert complete(client, **fields, **neutral) == complete(client, **fields)


def test_typical_p_keeps_little(client):
    texts = {complete(client, temperature=1.5, seed=seed, typical_p=1e-9, max_tokens=1).text for seed in range(8)}
    assert len(texts) == 1


def test_best_of_returns_the_most_probable_of_its_sequences(client):
    fields = dict(model="tiny", prompt=PROMPT, max_tokens=10, temperature=1.5, seed=3, logprobs=0)
    every = client.completions.create(**fields, n=6)
    means = [sum(choice.logprobs.token_logprobs) / max(1, len(choice.logprobs.token_logprobs)) for choice in every.choices]
    ranked = [every.choices[i].text for i in sorted(range(6), key=lambda i: -means[i])]
    best = client.completions.create(**fields, n=2, best_of=6)
    assert [choice.text for choice in best.choices] == ranked[:2] and [choice.index for choice in best.choices] == [0, 1]
    assert best.usage == every.usage  # what was dropped was made too


def test_prompt_logprobs(client, tokenizer):
    ids = tokenizer.encode(PROMPT)
    choice = complete(client, prompt_logprobs=2, max_tokens=1)
    echoed = complete(client, echo=True, logprobs=2, max_tokens=1)
    scores = choice.prompt_logprobs
    assert scores[0] is None and len(scores) == len(ids)
    for place, token, logprob in zip(scores[1:], ids[1:], echoed.logprobs.token_logprobs[1:]):
        assert place[str(token)]["logprob"] == logprob and 2 <= len(place) <= 3
        assert sorted(entry["rank"] for entry in place.values() if entry["rank"]) == [1, 2]
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens


def test_lm_evals_request_over_a_batch(base_url, tokenizer):
    """Its local-completions sends token ids of several contexts, and reads token_logprobs and top_logprobs[ctxlen:-1]."""
    texts = ["shutil.copyfile(src, dst) copies", "Größe 東京", "class Path:"]
    batch = [tokenizer.encode(text) for text in texts]
    body = {"model": "tiny", "prompt": batch, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = httpx.post(f"{base_url}/v1/completions", json=body, timeout=60).json()
    single = [httpx.post(f"{base_url}/v1/completions", json=body | {"prompt": one}, timeout=60).json()["choices"][0] for one in batch]
    for choice, alone, ids in zip(sorted(answer["choices"], key=lambda choice: choice["index"]), single, batch):
        assert choice["logprobs"] == alone["logprobs"]
        logprobs, top = choice["logprobs"]["token_logprobs"][1:-1], choice["logprobs"]["top_logprobs"][1:-1]
        assert len(logprobs) == len(ids) - 1 and all(value <= max(places.values()) for value, places in zip(logprobs, top))
        assert all(name in places for name, places in zip(choice["logprobs"]["tokens"][1:-1], top))


@pytest.mark.parametrize(("fields", "param"), [
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"99999": 1}}, "logit_bias"), ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"allowed_token_ids": []}, "allowed_token_ids"), ({"allowed_token_ids": [4000]}, "allowed_token_ids"), ({"typical_p": 0}, "typical_p"),
    ({"min_tokens": 13}, "min_tokens"), ({"stop_token_ids": [-5]}, "stop_token_ids"), ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"), ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
])  # fmt: skip
def test_refusals_name_the_field(base_url, fields, param):
    answer = httpx.post(f"{base_url}/v1/completions", json=FIELDS | fields, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_embeddings(client, base_url):
    texts = ["def main(argv):", "class Path:", "東京"]
    answer = client.embeddings.create(model="tiny", input=texts)
    alone = [client.embeddings.create(model="tiny", input=text, encoding_format="float").data[0].embedding for text in texts]
    assert [entry.index for entry in answer.data] == [0, 1, 2] and answer.usage.total_tokens == answer.usage.prompt_tokens > 3
    for entry, vector in zip(answer.data, alone):  # the client asks for base64 unless told otherwise
        assert entry.embedding == pytest.approx(vector, abs=1e-6)
        assert math.sqrt(sum(x * x for x in vector)) == pytest.approx(1, abs=1e-5)
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)
    for body in ({"input": []}, {"input": "x" * 10_000}, {"input": ["x"] * 3000}, {"input": "x", "dimensions": 5}, {"input": [[5000]]}):
        assert httpx.post(f"{base_url}/v1/embeddings", json={"model": "tiny", **body}).status_code == 400
