"""The loader: a pure function of (seed, step) that shows every token exactly once an epoch."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.config import UserError, save_json
from plinth.data.loader import IGNORE, QUOTA_ROWS, Stream, TokenLoader, heldout_windows, permutation
from plinth.data.shards import SplitWriter, open_split, token_dtype

END = 0


def write_shards(folder, lengths, kinds=None):
    """Write shards whose ids are all different, but for the end of text, so that each can be followed."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(1 << 20)
    numbers: dict[str, int] = {}
    counts, next_id = {}, 1
    for split in ("train", "heldout"):
        writer = SplitWriter(folder, split, dtype, END, numbers)
        for index, length in enumerate(lengths):
            ids = list(range(next_id, next_id + length))
            next_id += length
            writer.add([ids], ["\u00e9" * length], [kinds[index] if kinds else "text"])
        writer.close()
        counts[f"tokens_{split}"] = sum(lengths) + len(lengths)
    save_json(folder / "manifest.json", {"dtype": dtype.str, "kinds": list(numbers), **counts})
    return folder


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**63), seq_len=st.integers(1, 50), epoch=st.integers(0, 3))
def test_over_an_epoch_each_token_appears_exactly_once(tmp_path_factory, lengths, seed, seq_len, epoch):
    split = open_split(write_shards(tmp_path_factory.mktemp("s"), lengths))
    stream = Stream(split, np.arange(split.num_documents), seed)
    whole = Counter(split.tokens.tolist())
    total = split.num_tokens
    assert Counter(stream.tokens(epoch * total, total).tolist()) == whole
    rows_a_deal = max(1, total // seq_len)
    dealt = [stream.row(i, seq_len) for i in range(rows_a_deal * epoch, rows_a_deal * (epoch + 1))]
    straight = stream.tokens(rows_a_deal * epoch * seq_len, rows_a_deal * seq_len + 1)
    assert Counter(np.concatenate([row[:-1] for row in dealt]).tolist()) == Counter(straight[:-1].tolist())
    assert Counter(np.concatenate([row[1:] for row in dealt]).tolist()) == Counter(straight[1:].tolist())


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, start=st.integers(0, 500), n=st.integers(0, 300), cut=st.integers(0, 300))
def test_a_stretch_equals_its_pieces(tmp_path_factory, lengths, start, n, cut):
    split = open_split(write_shards(tmp_path_factory.mktemp("s"), lengths))
    stream = Stream(split, np.arange(split.num_documents), 5)
    cut = min(cut, n)
    joined = np.concatenate([stream.tokens(start, cut), stream.tokens(start + cut, n - cut)])
    assert (stream.tokens(start, n) == joined).all()


def test_documents_stay_whole_and_in_another_order_each_epoch(tmp_path):
    split = open_split(write_shards(tmp_path / "s", [5, 7, 0, 9, 3, 4, 6, 8]))
    stream = Stream(split, np.arange(8), 1)
    originals = {tuple(split.document(i).tolist()) for i in range(8)}
    orders = []
    for epoch in range(2):
        tokens = stream.tokens(epoch * split.num_tokens, split.num_tokens).tolist()
        pieces = []
        for token in tokens:
            if not pieces or pieces[-1][-1] == END:
                pieces.append([])
            pieces[-1].append(token)
        assert {tuple(piece) for piece in pieces} == originals
        orders.append(pieces)
    assert orders[0] != orders[1]


def test_a_batch_is_a_function_of_seed_and_step_alone(tmp_path):
    shards = write_shards(tmp_path / "s", [50, 20, 90, 33, 71])
    forward = TokenLoader(shards, 16, 4, seed=3)
    batches = [forward.batch(step) for step in range(20)]
    for step in (17, 0, 9):
        inputs, targets = TokenLoader(shards, 16, 4, seed=3).batch(step)
        assert torch.equal(inputs, batches[step][0]) and torch.equal(targets, batches[step][1])
        assert inputs.dtype == torch.int64 and inputs.shape == (4, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(TokenLoader(shards, 16, 4, seed=4).batch(0)[0], batches[0][0])


def test_rows_do_not_depend_on_how_many_are_asked_for_at_once(tmp_path):
    shards = write_shards(tmp_path / "s", [50, 20, 90, 33, 71])
    big, small = TokenLoader(shards, 8, 12, seed=0), TokenLoader(shards, 8, 3, seed=0)
    assert torch.equal(big.batch(2)[0], torch.cat([small.batch(step)[0] for step in range(8, 12)]))


def test_a_longer_row_holds_as_many_tokens_of_the_stream(tmp_path):
    shards = write_shards(tmp_path / "s", [100] * 9)
    loader = TokenLoader(shards, 8, 4, seed=0)
    inputs, targets = loader.rows(5, 2, seq_len=32)
    assert inputs.shape == (2, 32) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert loader.epochs(9) == pytest.approx(9 * 4 * 8 / 909)


def test_weights_set_the_shares_of_the_kinds(tmp_path):
    kinds = ["a", "b", "c"] * 10
    shards = write_shards(tmp_path / "s", [40, 10, 5] * 10, kinds)
    loader = TokenLoader(shards, 16, QUOTA_ROWS, seed=0, weights={"a": 1, "b": 2, "c": 0})
    split = loader.split
    kind_of = {int(token): kinds[i] for i in range(30) for token in split.document(i)[:-1]}
    inputs = loader.batch(1)[0]
    rows = Counter(next(kind_of[t] for t in row if t != END) for row in inputs.tolist())
    assert rows["a"] == 341 and rows["b"] == 683 and rows["c"] == 0
    for row in inputs.tolist()[:100]:
        assert len({kind_of[t] for t in row if t != END}) == 1
    assert torch.equal(loader.rows(7, 5)[0], loader.rows(0, 12)[0][7:])
    assert loader.epochs_by_kind(1)["b"] == pytest.approx(683 * 16 / 110)


def test_with_weights_each_kind_still_shows_every_token_once_an_epoch(tmp_path):
    shards = write_shards(tmp_path / "s", [31, 13, 20, 7], ["a", "b", "a", "b"])
    loader = TokenLoader(shards, 1, 64, seed=0, weights={"a": 0.5, "b": 0.5})
    seen = Counter(torch.cat([loader.batch(step)[0].ravel() for step in range(32)]).tolist())
    a = [t for i in (0, 2) for t in loader.split.document(i)[:-1].tolist()]
    b = [t for i in (1, 3) for t in loader.split.document(i)[:-1].tolist()]
    assert {seen[t] for t in a} <= {1024 // 53, 1024 // 53 + 1} and {seen[t] for t in b} <= {1024 // 22, 1024 // 22 + 1}


@pytest.mark.parametrize(
    "weights, text",
    [({"a": 1}, "leaves out b"), ({"a": 1, "b": 1, "z": 1}, "names z"), ({"a": 0, "b": 0}, "above 0"), ({"a": -1, "b": 2}, "from 0 up")],
)
def test_bad_weights_are_refused(tmp_path, weights, text):
    shards = write_shards(tmp_path / "s", [5, 5], ["a", "b"])
    with pytest.raises(UserError, match=text):
        TokenLoader(shards, 2, 2, seed=0, weights=weights)


def test_a_split_without_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        TokenLoader(write_shards(tmp_path / "s", []), 2, 2, seed=0)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 20), data=st.data())
def test_windows_score_each_token_of_each_document_once(tmp_path_factory, lengths, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    shards = write_shards(tmp_path_factory.mktemp("s"), lengths)
    split = open_split(shards, "heldout")
    scored, sizes = {}, Counter()
    for document, inputs, targets, num_bytes, num_chars in heldout_windows(shards, seq_len, stride):
        assert len(inputs) == len(targets) <= seq_len
        ids = split.document(document).tolist()
        chain = [END, *ids[:-1]]
        for source, target in zip(inputs.tolist(), targets.tolist()):
            if target != IGNORE:
                assert chain[chain.index(target) - 1] == source
                scored.setdefault(document, []).append(target)
        sizes[document] += num_bytes
        assert num_bytes == 2 * num_chars
    for index, length in enumerate(lengths):
        assert scored.get(index, []) == split.document(index).tolist()[:-1]
        assert sizes[index] == 2 * length


def test_a_permutation_is_one_and_depends_on_each_part_of_the_key():
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(n, 7).tolist()) == list(range(n))
    orders = {tuple(permutation(50, *key).tolist()) for key in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**63,), (-1,)]}
    assert len(orders) == 7


def test_the_order_is_the_same_for_ever():
    assert permutation(8, 0, 1, 2).tolist() == FIXED


FIXED = [7, 6, 3, 2, 0, 5, 1, 4]
