"""The verifier: normalisation, token F1 by hand, and what is a refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plinth.tasks.verify import REFUSAL, exact_match, is_refusal, is_right, token_f1


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("Copy a file.", "copy  a\nfile", True),
        ("Copy a file. ", "Copy a file.", True),
        ("Copy the file.", "Copy a file.", False),
        ("copyfile(src, dst)", "copyfile(src, dst)", True),
        ("copyfile(src)", "copyfile(src, dst)", False),
        ("", "Copy", False),
    ],
)
def test_exact_match(text, answer, same):
    assert exact_match(text, ["another", answer]) == float(same)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("the cat sat", "A cat sat", 1.0),  # articles do not count
        ("cat", "cat sat", 2 * 1 / 3),
        ("cat cat", "cat sat", 0.5),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("f(a,b)", "f(a, b)", 1.0),  # a is an article, so two words each
        ("f(x)", "f(x, y_z)", 0.8),
        ("", "cat", 0.0),
    ],
)
def test_token_f1_by_hand(text, answer, expected):
    assert token_f1(text, [answer]) == pytest.approx(expected)


def test_token_f1_takes_the_best_answer():
    assert token_f1("b c", ["x", "b", "b c d"]) == pytest.approx(0.8)


@given(st.text(max_size=30), st.text(max_size=30))
def test_token_f1_is_symmetric_and_bounded(a, b):
    assert token_f1(a, [b]) == pytest.approx(token_f1(b, [a]))
    assert 0.0 <= token_f1(a, [b]) <= 1.0
    assert token_f1(a, [a]) == 1.0 == exact_match(a, [a])


@pytest.mark.parametrize(
    "text",
    [REFUSAL, "I don’t know", "i do not know that name.", "I'm not sure.", "Sorry, I don't know.", "I am not aware of shutil.x.",
     "There is no such function.", "There is no function of that name", "shutil.copyarchive does not exist.", "Unknown."],
)  # fmt: skip
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    ["", "Copy a file.", "Unknown option error.", "Return True if there is no such file.", "There is nothing to return.",
     "I don't know, but I think that it copies all of the data from one file into another file, with its mode and its times kept."],
)  # fmt: skip
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_right_means_refusal_for_an_invented_name_only():
    assert is_right("I do not know.", [REFUSAL], invented=True)
    assert not is_right("Copy a file.", [REFUSAL], invented=True)
    assert not is_right("I don't know.", ["Copy a file."], invented=False)
    assert is_right("copy a file", ["Copy a file."], invented=False)
