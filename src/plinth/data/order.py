"""Orders of 0..n-1 that follow from integers alone, so that they are the same with every version of every library.

`permutation` sorts hashes: any order can come out, O(n). `permute` computes single places of an order without the others, in O(1)
time and memory whatever n is.
"""

from __future__ import annotations

import math

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6  # Luby and Rackoff 1988 need four for an order that no test of a few queries tells from a random one


def mix64(values: np.ndarray) -> np.ndarray:
    """Return a bijective scramble of 64-bit numbers. Source: Steele et al. 2014 (SplitMix64), its output function."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keyed_hash(values: np.ndarray, *key: int) -> np.ndarray:
    """Return 64-bit hashes of non-negative integers; they differ for different values of one key."""
    return mix64(values.astype(np.uint64) * _GOLDEN + _state(key))


def permutation(n: int, *key: int) -> np.ndarray:
    """Return an order of 0..n-1 that depends on the integers of `key` only; int64, shape (n,)."""
    return np.argsort(keyed_hash(np.arange(n), *key))  # the hashes all differ, so any way of sorting gives the same


def permute(places: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Return what a keyed order of 0..n-1 has at `places`; int64 of the same shape.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains": the numbers are pairs (left < a, right < b) with a·b the
    least that holds n, each round adds a hash of one half to the other, and a result of n or more goes round again.
    """
    a = max(1, math.isqrt(max(0, n - 1)) + 1)
    b = max(1, -(-n // a))
    result = _rounds(np.asarray(places).astype(np.uint64), a, b, key)
    while (outside := result >= n).any():
        result[outside] = _rounds(result[outside], a, b, key)
    return result.astype(np.int64)


def _rounds(values: np.ndarray, a: int, b: int, key: tuple[int, ...]) -> np.ndarray:
    size_a, size_b = np.uint64(a), np.uint64(b)
    left, right = values // size_b, values % size_b
    state = _state(key)
    for i in range(_ROUNDS):
        state = mix64(state + _GOLDEN)
        if i % 2:
            right = (right + mix64(left * _GOLDEN + state) % size_b) % size_b
        else:
            left = (left + mix64(right * _GOLDEN + state) % size_a) % size_a
    return left * size_b + right


def _state(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix64(state + _GOLDEN + np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return state
