"""A stream's pieces join to the whole answer, whatever the tokens, the stops and the characters: 10,000 cases."""

import random

import pytest

from plinth.inference.engine import Event
from plinth.inference.text import TextAssembler
from plinth.serving.pieces import Assembly
from plinth.tokenizer.train import train_tokenizer

ALPHABET = ["a", "b", " ", "\n", "ö", "ß", "東", "京", "🙂", "\u0301", "\u200d", "\ufeff", "\x00", "�", "<|end|>", "stop"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["".join(ALPHABET) * 3, "stop stopping 東京 ö 🙂 abba"] * 5, vocab_size=320)


def check_case(tokenizer, rng: random.Random) -> None:
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 30))]
    if rng.random() < 0.5:  # text rather than noise
        ids = tokenizer.encode("".join(rng.choices(ALPHABET, k=rng.randint(1, 30)))) or ids
    whole = tokenizer.decode(ids)
    stops = tuple({"".join(rng.choices(ALPHABET, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 4))})
    if whole and rng.random() < 0.5:
        start = rng.randrange(len(whole))
        stops += (whole[start : start + rng.randint(1, 4)],)
    ends_by_itself = rng.random() < 0.5
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(found)[1]] if found else whole  # the one that is complete first counts
    assembly, text, held, reason = Assembly(tokenizer, stops), "", [], None
    for number, token in enumerate([*ids, tokenizer.end_id] if ends_by_itself else ids):
        is_last = number == len(ids) - (not ends_by_itself)
        piece = assembly.push(Event(0, token, -1.0, [], ("stop" if ends_by_itself else "length") if is_last else None))
        text += piece.text
        held += [one.id for one in piece.tokens]
        assert expected.startswith(text), "a piece was sent that the whole answer does not have"
        reason = piece.finish_reason
        if reason:
            break
    assert text == expected and reason == ("stop" if found or ends_by_itself else "length")
    assert held == ids[: len(held)]
    assembler = TextAssembler(tokenizer, stops)
    assert "".join(map(assembler.push, ids)) + assembler.flush() == expected


def test_pieces_join_to_the_whole_in_10_000_cases(tokenizer):
    rng = random.Random(2026)
    for _ in range(10_000):
        check_case(tokenizer, rng)
