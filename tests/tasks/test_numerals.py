"""Numerals: names checked by hand, no two numbers with one name, and draws that can be told apart."""

import pytest

from plinth.config import UserError
from plinth.tasks.numerals import english, german, numeral_pairs

KNOWN = {
    0: ("zero", "null"),
    1: ("one", "eins"),
    11: ("eleven", "elf"),
    16: ("sixteen", "sechzehn"),
    21: ("twenty-one", "einundzwanzig"),
    30: ("thirty", "dreißig"),
    77: ("seventy-seven", "siebenundsiebzig"),
    100: ("one hundred", "einhundert"),
    101: ("one hundred one", "einhunderteins"),
    627: ("six hundred twenty-seven", "sechshundertsiebenundzwanzig"),
    1000: ("one thousand", "eintausend"),
    1911: ("one thousand nine hundred eleven", "eintausendneunhundertelf"),
    21_000: ("twenty-one thousand", "einundzwanzigtausend"),
    101_001: ("one hundred one thousand one", "einhunderteintausendeins"),
    999_999: ("nine hundred ninety-nine thousand nine hundred ninety-nine", "neunhundertneunundneunzigtausendneunhundertneunundneunzig"),
}


@pytest.mark.parametrize("number", KNOWN)
def test_names_are_those_of_the_languages(number):
    assert (english(number), german(number)) == KNOWN[number]


def test_no_two_numbers_share_a_name():
    pairs = numeral_pairs(5000, below=5000)
    assert len({one for one, _ in pairs}) == len({other for _, other in pairs}) == 5000


def test_more_of_a_seed_begin_with_fewer_of_it():
    assert numeral_pairs(50, seed=1)[:20] == numeral_pairs(20, seed=1) != numeral_pairs(20, seed=2)
    with pytest.raises(UserError, match="count=20 numbers below 10"):
        numeral_pairs(20, below=10)
