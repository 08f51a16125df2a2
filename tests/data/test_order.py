"""Orders from hashes: permutations all, the same for ever, and each as likely as another."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.data.order import permutation, permute

KEYS = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**63,), (-1,)]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 3000), key=st.lists(st.integers(-(2**63), 2**64), max_size=3))
def test_both_orders_hold_each_number_once(n, key):
    assert sorted(permutation(n, *key).tolist()) == list(range(n))
    assert sorted(permute(np.arange(n), n, *key).tolist()) == list(range(n))


def test_orders_depend_on_each_part_of_the_key():
    assert len({tuple(permutation(50, *key).tolist()) for key in KEYS}) == len(KEYS)
    assert len({tuple(permute(np.arange(50), 50, *key).tolist()) for key in KEYS}) == len(KEYS)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**63), places=st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_single_places_of_a_huge_order_are_distinct_and_the_same_alone(n, seed, places):
    places = np.array(sorted({place % n for place in places}))
    together = permute(places, n, seed)
    assert len(set(together.tolist())) == len(places) and together.min() >= 0 and together.max() < n
    assert [int(permute(places[i : i + 1], n, seed)[0]) for i in range(len(places))] == together.tolist()


def test_every_order_of_four_is_about_as_likely():
    count = 6000
    found = Counter(tuple(permute(np.arange(4), 4, key).tolist()) for key in range(count))
    expected = count / 24
    chi2 = sum((n - expected) ** 2 / expected for n in found.values())
    assert len(found) == 24
    assert chi2 < 23 + 5 * math.sqrt(2 * 23)  # 23 degrees of freedom: five deviations above the mean


def test_neighbours_land_independently():
    pairs = np.array([permute(np.array([5, 6]), 10_007, key) for key in range(2000)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 5 / math.sqrt(len(pairs))


@pytest.mark.parametrize(
    "order, expected",
    [
        (lambda: permutation(8, 0, 1, 2), [7, 6, 3, 2, 0, 5, 1, 4]),
        (lambda: permute(np.arange(8), 8, 0, 1, 2), [5, 3, 4, 1, 0, 6, 2, 7]),
        (lambda: permute(np.array([0, 1, 10**12]), 10**13, 7), [4239290173533, 9572533879503, 5287991314673]),
    ],
)
def test_the_orders_are_the_same_for_ever(order, expected):
    assert order().tolist() == expected
