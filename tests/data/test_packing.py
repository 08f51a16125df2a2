"""Best-fit packing: as good as the plain algorithm, nothing lost, nothing cut that fits, another order each epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.files import write_shards
from plinth.data.packing import Packed, best_fit_decreasing
from plinth.data.rows import IGNORE, read_rows
from plinth.data.shards import open_split

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=14)


def plain_best_fit(lengths, capacity):
    """Do it a piece at a time; returns the rooms left, sorted."""
    rooms = []
    for length in lengths:
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda i: rooms[i])] -= length
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_rows_are_filled_as_by_the_plain_algorithm(capacity, data):
    lengths = sorted(data.draw(st.lists(st.integers(1, capacity), max_size=60)), reverse=True)
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert sorted((capacity - filled).astype(int).tolist()) == plain_best_fit(lengths, capacity)


def test_a_packing_worked_by_hand():
    # 7 fills row 0 up to 3, 6 row 1 up to 4; 4 fits row 1 exactly, 3 row 0 exactly, 2 opens row 2
    assert best_fit_decreasing(np.array([7, 6, 4, 3, 2]), 10).tolist() == [0, 1, 1, 0, 2]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**63), seq_len=st.integers(1, 50), epoch=st.integers(0, 3))
def test_over_an_epoch_each_token_is_once_an_input_and_once_a_target(tmp_path_factory, lengths, seed, seq_len, epoch):
    split = open_split(write_shards(tmp_path_factory.mktemp("s"), lengths))
    packed = Packed(split, None, seed)
    per_epoch = packed.rows_an_epoch(seq_len)
    pieces = packed.pieces(np.arange(epoch * per_epoch, (epoch + 1) * per_epoch), seq_len)
    inputs, targets, segments = read_rows(split, pieces, seq_len)
    real = targets != IGNORE
    whole = Counter(split.tokens.tolist())
    assert Counter(targets[real].tolist()) == whole and Counter(inputs[real].tolist()) == whole
    assert (np.diff(real.astype(int), axis=1) <= 0).all()  # padding only at the end of a row
    cuts = Counter(pieces.document.tolist())
    for document, length in enumerate(lengths):
        assert cuts[document] == -(-(length + 1) // seq_len)  # as few pieces as there can be
    for row in range(per_epoch):
        here = slice(pieces.first[row], pieces.first[row + 1])
        numbers = np.repeat(np.arange(here.stop - here.start), pieces.length[here])
        assert (segments[row, : len(numbers)] == numbers).all() and (segments[row, len(numbers) :] == here.stop - here.start).all()


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 50), rows=st.lists(st.integers(0, 200), min_size=1, max_size=9))
def test_rows_in_any_company_are_the_same(tmp_path_factory, lengths, seq_len, rows):
    split = open_split(write_shards(tmp_path_factory.mktemp("s"), lengths))
    together = read_rows(split, Packed(split, None, 3).pieces(np.array(rows), seq_len), seq_len)
    for i, row in enumerate(rows):
        alone = read_rows(split, Packed(split, None, 3).pieces(np.array([row]), seq_len), seq_len)
        assert all((a[i] == b[0]).all() for a, b in zip(together, alone))


def test_epochs_differ_in_company_and_order(tmp_path):
    split = open_split(write_shards(tmp_path / "s", [3] * 40 + [5] * 40))
    packed = Packed(split, None, 0)
    companies = []
    for epoch in range(2):
        pieces = packed.pieces(np.arange(20, dtype=np.int64) + epoch * packed.rows_an_epoch(20), 20)
        documents = [tuple(sorted(part.tolist())) for part in np.split(pieces.document, pieces.first[1:-1])]
        companies.append(documents)
    assert len(set(companies[0]) & set(companies[1])) < 5 and companies[0] != companies[1]


@pytest.mark.parametrize("seq_len", [64, 512])
def test_padding_is_little_at_the_lengths_of_real_text(tmp_path, seq_len):
    lengths = (np.random.default_rng(0).lognormal(5, 1.2, 2000).astype(int) + 1).tolist()
    split = open_split(write_shards(tmp_path / "s", lengths))
    packed = Packed(split, None, 0)
    fewest = -(-split.num_tokens // seq_len)
    assert packed.rows_an_epoch(seq_len) <= 1.001 * fewest + 1
