"""The text layer: no stop string leaks, characters are whole, a stream is its completion."""

import codecs

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextAssembler, TextEngine
from plinth.tokenizer.chat import render

ALPHABET = "abé東🙂 "


class Bytes:
    """A vocabulary of all pieces of one or two bytes, so that a text can be cut anywhere."""

    @staticmethod
    def token_bytes(token: int) -> bytes:
        return bytes([token]) if token < 256 else bytes([(token - 256) // 256, (token - 256) % 256])


def first_complete(text: str, stops: list[str]) -> str:
    """The slow twin: read on character by character until the text ends with a stop string."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))]
    return text


@settings(max_examples=300, deadline=None)
@given(st.text(ALPHABET, max_size=12), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3), st.randoms())
def test_pieces_are_the_text_up_to_the_stop_however_it_is_cut(text, stops, rng):
    data, tokens = text.encode(), []
    while data:
        size = rng.choice((1, 2)) if len(data) > 1 else 1
        tokens.append(data[0] if size == 1 else 256 + data[0] * 256 + data[1])
        data = data[size:]
    assembler, shown = TextAssembler(Bytes(), stops), ""
    expected = first_complete(text, stops)
    for token in tokens:
        shown += assembler.push(token)
        assert expected.startswith(shown)
    shown += assembler.flush()
    assert shown == expected and "\ufffd" not in shown
    assert assembler.stopped == (expected != text or any(text == stop for stop in stops) or first_complete(text + "\0", stops) == text)


def test_text_without_a_stop_is_not_delayed():
    assembler = TextAssembler(Bytes(), ["xyz"])
    assert [assembler.push(byte) for byte in b"axb"] == ["a", "", "xb"]
    assert [assembler.push(byte) for byte in "é".encode()] == ["", "é"]


def test_an_unfinished_character_shows_at_the_end():
    assembler = TextAssembler(Bytes())
    assert assembler.push("東".encode()[0]) == ""
    assert assembler.flush() == "\ufffd"


def params(**fields) -> SamplingParams:
    return SamplingParams(**({"seed": 4, "max_tokens": 40, "temperature": 1.2} | fields))


def test_a_stream_is_its_completion(text_engine):
    for seed in range(6):
        for stop in ((), ("e",), ("th", "a c", "on")):
            wanted = params(seed=seed, stop=stop, logprobs=2)
            whole = text_engine.complete(["def main("], wanted)[0]
            deltas = list(text_engine.stream("def main(", wanted))
            assert "".join(delta.text for delta in deltas) == whole.text
            assert deltas[-1].finish_reason == whole.finish_reason
            assert all(delta.finish_reason is None for delta in deltas[:-1])
            streamed = [token for delta in deltas for token in delta.tokens]
            assert streamed[: len(whole.tokens)] == whole.tokens
            assert not any(string in whole.text for string in stop)
            assert text_engine.engine.num_active == 0


def test_stop_string_cuts_text_and_tokens(text_engine):
    free = text_engine.complete(["main"], params(seed=2))[0]
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    cut = text_engine.complete(["main"], params(seed=2, stop=(stop,)))[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.tokens == free.tokens[: len(cut.tokens)] and cut.logprobs == free.logprobs[: len(cut.tokens)]
    held = b"".join(text_engine.tokenizer.token_bytes(token) for token in cut.tokens)
    assert codecs.decode(held, "utf-8", "replace").startswith(cut.text)


def test_complete_takes_texts_and_tokens(text_engine):
    ids = text_engine.tokenizer.encode("café")
    texts = text_engine.complete(["café", ids], [params(), params()])
    assert texts[0] == texts[1] and texts[0].prompt_tokens == len(ids)
    with pytest.raises(UserError, match="list of prompts"):
        text_engine.complete("café")


def test_an_empty_text_begins_a_document(text_engine):
    begun = text_engine.complete([[text_engine.tokenizer.end_of_text_id]], params())[0]
    assert text_engine.complete([""], params())[0] == begun


def test_closing_a_stream_frees_its_slot(text_engine):
    stream = text_engine.stream("a", params(max_tokens=100))
    next(stream)
    assert text_engine.engine.num_active == 1
    stream.close()
    assert text_engine.engine.num_active == 0


def test_chat_renders_the_conversation_and_ends_at_the_end_token(make_model, tokenizer):
    """The engine has no end tokens of its own here: chat must bring them."""
    engine = TextEngine(Engine(make_model(vocab_size=tokenizer.vocab_size)), tokenizer)
    messages = [{"role": "system", "content": "Be <|end|> brief."}, {"role": "user", "content": "café?"}]
    prompt = render(tokenizer, messages, add_generation_prompt=True).tokens
    with torch.no_grad():  # the prompt's own end makes <|end|> the certain next token
        hidden = engine.engine.runner.model(torch.tensor([prompt]))[0, -1]
        engine.engine.runner.model.embed.weight[tokenizer.end_id] += hidden / hidden.norm() * 0.5
    answer = engine.chat([messages], params(max_tokens=100, temperature=1.0))[0]
    assert answer.prompt_tokens == len(prompt)
    assert tokenizer.end_id not in answer.tokens and tokenizer.end_of_text_id not in answer.tokens
    plain = engine.complete([prompt], params(max_tokens=100, temperature=1.0))[0]
    ends = [i for i, token in enumerate(plain.tokens) if token in (tokenizer.end_id, tokenizer.end_of_text_id)]
    assert answer.tokens == plain.tokens[: ends[0]] if ends else answer == plain
    assert "".join(delta.text for delta in engine.stream_chat(messages, params(max_tokens=100, temperature=1.0))) == answer.text


def test_a_tokenizer_of_another_model_is_refused(make_model, tokenizer):
    with pytest.raises(UserError, match="do not belong together"):
        TextEngine(Engine(make_model(vocab_size=100)), tokenizer)
