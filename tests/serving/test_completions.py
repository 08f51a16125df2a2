"""/v1/completions, as the official client sees it."""

import math

import pytest

PROMPT = "def main(argv):"


def test_lists_the_model(client):
    listed = client.models.list()
    assert [(model.id, model.object) for model in listed] == [("tiny", "model")]
    assert client.models.retrieve("tiny").id == "tiny"


def test_greedy_text_usage_and_reason(client, make_text_engine):
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12)
    choice = answer.choices[0]
    prompt_tokens = len(make_text_engine().tokenizer.encode(PROMPT))
    assert answer.object == "text_completion" and answer.model == "tiny" and choice.index == 0
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    assert answer.usage.prompt_tokens == prompt_tokens
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == prompt_tokens + answer.usage.completion_tokens


def test_default_is_sixteen_tokens(client):
    answer = client.completions.create(model="tiny", prompt=PROMPT, seed=1)
    assert answer.usage.completion_tokens <= 16


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_and_logprobs_equal_the_whole_answer(client, seed):
    fields = dict(model="tiny", prompt="東京 ", seed=seed, max_tokens=40, temperature=1.3, logprobs=3, stop=["e", "☃"])
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    usage_chunk = chunks.pop()
    assert usage_chunk.choices == [] and usage_chunk.usage == whole.usage
    assert all(chunk.usage is None and chunk.id == chunks[0].id for chunk in chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [item for chunk in chunks for item in getattr(chunk.choices[0].logprobs, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)


def test_without_include_usage_no_chunk_has_usage(client):
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, seed=3, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_stream_ends_with_done(post):
    lines = post("/v1/completions", prompt=PROMPT, seed=3, stream=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])


def test_seed_fixes_the_text_and_the_default_does_not(client):
    def text(**fields):
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=1.5, **fields).choices[0].text

    assert text(seed=7) == text(seed=7)
    assert len({text(seed=seed) for seed in range(4)}) > 1
    assert len({text() for _ in range(4)}) > 1


def test_n_choices_are_the_seeds_that_follow(client):
    fields = dict(model="tiny", prompt=PROMPT, max_tokens=10, temperature=1.5)
    several = client.completions.create(**fields, seed=10, n=3)
    singles = [client.completions.create(**fields, seed=10 + i) for i in range(3)]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [choice.text for choice in several.choices] == [single.choices[0].text for single in singles]
    assert several.usage.completion_tokens == sum(single.usage.completion_tokens for single in singles)


def test_list_of_prompts_and_of_token_lists(client, make_text_engine):
    tokenizer = make_text_engine().tokenizer
    prompts = [PROMPT, "class Path:", "🙂"]
    fields = dict(model="tiny", max_tokens=8, temperature=0)
    singles = [client.completions.create(prompt=prompt, **fields).choices[0].text for prompt in prompts]
    texts = client.completions.create(prompt=prompts, **fields)
    ids = client.completions.create(prompt=[tokenizer.encode(prompt) for prompt in prompts], **fields)
    one = client.completions.create(prompt=tokenizer.encode(PROMPT), **fields)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices] == singles
    assert one.choices[0].text == singles[0]


def test_empty_prompt_starts_a_document(client, make_text_engine):
    start = make_text_engine().tokenizer.end_of_text_id
    fields = dict(model="tiny", max_tokens=8, temperature=0)
    assert client.completions.create(prompt="", **fields).choices == client.completions.create(prompt=[start], **fields).choices


def test_stop_cuts_before_the_string(client):
    fields = dict(model="tiny", prompt=PROMPT, max_tokens=60, temperature=1.0, seed=5)
    full = client.completions.create(**fields).choices[0].text
    stop = full[10:13]
    cut = client.completions.create(**fields, stop=stop).choices[0]
    assert cut.text == full[: full.index(stop)] and cut.finish_reason == "stop"
    assert client.completions.create(**fields, stop=["\0\0", stop]).choices[0] == cut


def test_stop_token_ids_end_the_text(client, make_text_engine):
    fields = dict(model="tiny", prompt=PROMPT, max_tokens=30, seed=5, logprobs=0)
    full = client.completions.create(**fields).choices[0].logprobs.tokens
    word = full[3]
    stop = next(i for i in range(6, 400) if make_text_engine().tokenizer.token_bytes(i) == word.encode())
    cut = client.completions.create(**fields, extra_body={"stop_token_ids": [stop]}).choices[0]
    assert cut.logprobs.tokens == full[: full.index(word)] and cut.finish_reason == "stop"
    cut = client.completions.create(**fields, extra_body={"stop_token_ids": list(range(400))}).choices[0]
    assert cut.text == "" and cut.finish_reason == "stop"


@pytest.mark.parametrize("seed", range(3))
def test_logprobs_object(client, seed):
    choice = client.completions.create(model="tiny", prompt="Größe ", max_tokens=40, seed=seed, temperature=1.2, logprobs=4).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) > 0
    for name, value, alternatives, offset in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset):
        assert value <= 0 and alternatives[name] == value
        assert 4 <= len(alternatives) <= 5
        assert sum(map(math.exp, alternatives.values())) <= 1 + 1e-5
        if not name.startswith(("bytes:", "<|")):
            assert choice.text[offset:].startswith(name)


def test_chosen_token_is_exactly_the_top_one_when_greedy(client):
    logprobs = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=1).choices[0].logprobs
    assert all(value == max(top.values()) for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs))


def test_extensions_top_k_and_min_p(client):
    fields = dict(model="tiny", prompt=PROMPT, max_tokens=15, temperature=2.0, seed=1)
    greedy = client.completions.create(**fields | {"temperature": 0}).choices[0].text
    assert client.completions.create(**fields, extra_body={"top_k": 1}).choices[0].text == greedy
    assert client.completions.create(**fields, extra_body={"min_p": 1.0}).choices[0].text == greedy
    assert client.completions.create(**fields, top_p=1e-9).choices[0].text == greedy
    assert client.completions.create(**fields, extra_body={"top_k": -1}).choices == client.completions.create(**fields).choices


def test_echo_puts_the_scored_prompt_first(client, make_text_engine):
    """What lm-eval's local-completions asks for, and reads."""
    text_engine = make_text_engine()
    ids = text_engine.tokenizer.encode("def main(argv): 東")
    fields = dict(model="tiny", prompt=ids, temperature=0, max_tokens=1, logprobs=2)
    choice = client.completions.create(**fields, echo=True).choices[0]
    after = client.completions.create(**fields).choices[0]
    assert choice.text == "def main(argv): 東" + after.text
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert logprobs.tokens[len(ids) :] == after.logprobs.tokens
    assert logprobs.token_logprobs[len(ids) :] == after.logprobs.token_logprobs
    for position in range(1, len(ids)):
        step = client.completions.create(**fields | {"prompt": ids[:position]}).choices[0].logprobs
        assert max(logprobs.top_logprobs[position].values()) == pytest.approx(step.token_logprobs[0], abs=1e-5)
        assert logprobs.top_logprobs[position][logprobs.tokens[position]] == logprobs.token_logprobs[position]
    alone = client.completions.create(**fields | {"max_tokens": 0}, echo=True).choices[0]
    assert alone.text == "def main(argv): 東" and alone.logprobs.token_logprobs == logprobs.token_logprobs[: len(ids)]
    streamed = list(client.completions.create(**fields, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
