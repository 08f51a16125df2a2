"""Duplicates: found whatever the order, verified, and counted as MinHash theory says."""

import random

import numpy as np
import pytest

from plinth.data import dedup

WORDS = [f"w{i}" for i in range(5000)]


def passage(chance, length=200):
    return [chance.choice(WORDS) for _ in range(length)]


def test_white_space_alone_makes_no_difference():
    kept = dedup.exact_duplicates(["a b\nc", "x", " a  b c ", "A b c"], [3, 0, 1, 2])
    assert kept.tolist() == [2, 1, 2, 3]


def test_a_changed_word_makes_a_near_duplicate_and_another_text_does_not():
    chance = random.Random(0)
    original = passage(chance)
    changed = [*original[:100], "other", *original[101:]]
    texts = [" ".join(original), " ".join(passage(chance)), ", ".join(changed).upper()]
    assert dedup.near_duplicates(texts, [1, 2, 0], 0.8).tolist() == [2, 1, 2]
    assert dedup.near_duplicates(texts, [1, 2, 0], 1.0).tolist() == [0, 1, 2]


def test_the_kept_copies_do_not_depend_on_the_order():
    chance = random.Random(2)
    texts = []
    for _ in range(30):
        base = passage(chance, 120)
        for _ in range(chance.choice([1, 2, 40])):  # 40 overfill a bucket
            copy = list(base)
            copy[chance.randrange(120)] = chance.choice(WORDS)
            texts.append(" ".join(copy))
    results = []
    for seed in range(3):
        order = list(range(len(texts)))
        random.Random(seed).shuffle(order)
        shuffled = [texts[i] for i in order]
        kept = dedup.near_duplicates(shuffled, [(-len(text), text) for text in shuffled], 0.8)
        results.append({shuffled[i] for i in set(kept.tolist())})
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 30


def test_pairs_are_found_as_often_as_theory_says():
    chance = random.Random(3)
    texts, similarity = [], []
    for _ in range(300):
        base = passage(chance, 100)
        copy = list(base)
        for place in chance.sample(range(100), 2):
            copy[place] = chance.choice(WORDS)
        texts += [" ".join(base), " ".join(copy)]
        similarity.append(dedup.jaccard(dedup.shingles(texts[-1]), dedup.shingles(texts[-2])))
    found = {tuple(pair) for pair in dedup.candidate_pairs(dedup.signatures(texts)).tolist()}
    expected = [1 - (1 - s**dedup.BAND_ROWS) ** dedup.NUM_BANDS for s in similarity]
    hits = sum((2 * i, 2 * i + 1) in found for i in range(300))
    spread = np.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(hits - sum(expected)) < 4 * spread + 1


def test_signatures_estimate_the_jaccard_similarity():
    chance = random.Random(4)
    errors = []
    for _ in range(40):
        base = passage(chance, 300)
        copy = [*base[:150], *passage(chance, 150)] if chance.random() < 0.5 else [*base[:270], *passage(chance, 30)]
        texts = [" ".join(base), " ".join(copy)]
        signature = dedup.signatures(texts)
        errors.append((signature[0] == signature[1]).mean() - dedup.jaccard(*map(dedup.shingles, texts)))
    assert abs(np.mean(errors)) < 0.03 and np.sqrt(np.mean(np.square(errors))) < 0.07


def test_scripts_without_spaces_are_compared_by_character():
    base = "".join(map(chr, random.Random(5).choices(range(0x4E00, 0x5200), k=300)))
    changed = base[:150] + "\u9fa5" + base[151:]
    assert dedup.near_duplicates([base, changed, base[::-1]], [0, 1, 2], 0.8).tolist() == [0, 0, 2]


def test_texts_of_symbols_and_short_texts_are_no_duplicates_of_one_another():
    texts = ["!!! ??? ...", "*** +++ ---", "one two", "one three", "", " "]
    assert dedup.near_duplicates(texts, range(6), 0.8).tolist()[:4] == [0, 1, 2, 3]


def test_no_documents():
    assert dedup.near_duplicates([], [], 0.8).shape == (0,)


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_only_pairs_over_the_threshold_are_verified(threshold):
    forms = ["a b c d e f g h", "a b c d e f g x", "a b c d e f g h i"]
    pairs = np.array([[0, 1], [0, 2], [1, 2]])
    expected = [pair for pair in pairs.tolist() if dedup.jaccard(*(dedup.shingles(forms[i]) for i in pair)) >= threshold]
    assert dedup.verified_pairs(pairs, forms, threshold).tolist() == expected
