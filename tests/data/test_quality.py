"""Quality rules: each drops what it is for, and none drops writing, in whatever script."""

import random

import pytest

from plinth.data.quality import RULES, judge, repeated_ngram_share

ENGLISH = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should act "
    "towards one another in a spirit of brotherhood.\nEveryone is entitled to all the rights and freedoms set forth here.\n"
)
WRITING = [
    ENGLISH,
    "人人生而自由，在尊嚴和權利上一律平等。",
    "सभी मनुष्यों को गौरव और अधिकारों",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV",
    "".join(random.Random(0).choices("ACGT", k=3000)),
]
CODE = "import os\n\n\ndef walk(path):\n    for name in os.listdir(path):\n        yield name, os.stat(name).st_size  # bytes\n"


@pytest.mark.parametrize("text", WRITING)
def test_writing_is_kept(text):
    assert judge(text, "text") is None


def test_code_is_kept():
    assert judge(CODE, "code") is None


DROPPED = [
    ("too_short", "Page 3.", "text"),
    ("unprintable", "word \x01\x02\ufffd\x03 " * 5, "text"),
    ("low_alphabetic", "12.5 | 33.1 | 99.2 | 17.0 |\n" * 3, "text"),
    ("long_lines", ";".join(f"render{i}(element)" for i in range(400)), "code"),
    ("literal_lines", "TABLE = (\n" + "".join(f"    0x{i:04x}: 0x{i * 7:04x},  # LETTER {i}\n" for i in range(50)) + ")\n", "code"),
    ("repeated_lines", "Subscribe to our letter now!\n" * 4 + "And one line of text.\n", "text"),
    ("repeated_ngrams", "the cat sat on the mat and then the dog barked at it loudly " * 4, "text"),
    ("compressible", "\u597d\u7684\u8c22\u8c22" * 400, "text"),
]


@pytest.mark.parametrize("rule, text, kind", DROPPED)
def test_each_rule_drops_what_it_is_for(rule, text, kind):
    found, reason = judge(text, kind)
    assert found == rule and any(character.isdigit() for character in reason)


@pytest.mark.parametrize("rule, text, kind", DROPPED)
def test_a_rule_left_out_drops_nothing(rule, text, kind):
    verdict = judge(text, kind, frozenset({rule}))
    assert verdict is None or verdict[0] != rule


def test_every_rule_is_tested():
    assert {rule for rule, _, _ in DROPPED} == set(RULES)


def test_prose_and_code_have_different_limits():
    minified = DROPPED[3][1]
    assert judge(minified, "code")[0] == "long_lines"
    assert (judge(minified, "text") or ("",))[0] != "long_lines"


def naive_share(words, n):
    seen, covered = set(), set()
    for start in range(len(words) - n + 1):
        run = tuple(words[start : start + n])
        if run in seen:
            covered.update(range(start, start + n))
        seen.add(run)
    return len(covered) / len(words) if words else 0.0


def test_the_repeated_share_equals_its_slow_twin():
    chance = random.Random(1)
    for length in (0, 1, 9, 10, 11, 60, 400):
        for alphabet in ("a", "ab", "abcdefgh"):
            words = [chance.choice(alphabet) for _ in range(length)]
            for n in (2, 5, 10):
                if length > n:
                    assert repeated_ngram_share(words, n) == pytest.approx(naive_share(words, n))
                else:
                    assert repeated_ngram_share(words, n) == 0.0


def test_an_empty_text_is_too_short_and_breaks_no_rule():
    assert judge("", "text")[0] == "too_short"
    for name in RULES:
        judge("", "code", frozenset(RULES) - {name})
