"""Text and tokens in step: no half characters, no part of a stop string, nothing lost."""

import codecs
import random

import pytest

from plinth.inference.engine import Event
from plinth.serving.pieces import Assembly, CharacterCount
from plinth.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Größe 東京 🙂 stop stopping and other words"] * 5, vocab_size=300)


def character_of_each_byte(data: bytes) -> list[int]:
    """The slow twin: for each byte, the index of the character that it is part of, by Python's own error positions."""
    broken = []

    def record(error):
        broken.append((error.start, error.end))
        return "\N{REPLACEMENT CHARACTER}", error.end

    codecs.register_error("plinth-test-record", record)
    text = data.decode("utf-8", "plinth-test-record")
    owners, spans = [], dict(broken)
    for index, character in enumerate(text):
        here = len(owners)
        length = spans[here] - here if here in spans else len(character.encode())
        owners += [index] * length
    return owners


@pytest.mark.parametrize("seed", range(100))
def test_character_count_is_where_each_token_begins(seed):
    rng = random.Random(seed)
    alphabet = [0x41, 0xC3, 0xB6, 0xE6, 0x9D, 0xB1, 0xF0, 0x9F, 0x99, 0x82, 0xE0, 0x80, 0xFF]
    parts = [bytes(rng.choices(alphabet, k=rng.randint(1, 3))) for _ in range(20)]
    data = b"".join(parts)
    owners = character_of_each_byte(data)
    counter, begin = CharacterCount(), 0
    for part in parts:
        assert counter.advance(part)[0] == owners[begin]
        begin += len(part)
    assert len(data.decode("utf-8", "replace")) - 1 <= counter.count <= len(data.decode("utf-8", "replace"))


@pytest.mark.parametrize("seed", range(50))
def test_pieces_join_to_the_text_before_the_first_stop(tokenizer, seed):
    rng = random.Random(seed)
    ids = [rng.randrange(6, tokenizer.vocab_size) for _ in range(40)]
    stop = tuple(rng.sample(["stop", "京", "o", "öß", "and o", "zz"], k=2))
    whole = tokenizer.decode(ids)
    cut = min((i + len(s), i) for s in (*stop, "") if (i := (whole.find(s) if s else len(whole))) >= 0)[1]  # first complete one
    assembly, text, tokens = Assembly(tokenizer, stop), "", []
    for number, token in enumerate(ids):
        piece = assembly.push(Event(0, token, -1.0, [], "length" if number == len(ids) - 1 else None))
        text += piece.text
        tokens += [t.id for t in piece.tokens]
        assert whole.startswith(text)
        if piece.finish_reason:
            break
    assert text == whole[:cut] and piece.finish_reason == ("stop" if cut < len(whole) else "length")
    assert tokens == ids[: len(tokens)] and tokenizer.decode(tokens).startswith(text)
    assert len(tokenizer.decode(tokens[:-1])) <= len(text)  # the last token begins before the end


def test_the_end_token_adds_no_text(tokenizer):
    assembly = Assembly(tokenizer, ())
    first = assembly.push(Event(0, tokenizer.encode("a")[0], -1.0, [], None))
    last = assembly.push(Event(0, tokenizer.end_id, -1.0, [], "stop"))
    assert (first.text, last.text, last.tokens, last.finish_reason, last.num_generated) == ("a", "", (), "stop", 1)
