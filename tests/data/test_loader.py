"""The loader: a pure function of (seed, step) that shows every token exactly once an epoch."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.files import END, write_shards
from plinth.config import UserError
from plinth.data import stream as stream_module
from plinth.data.loader import TokenLoader
from plinth.data.mixture import QUOTA_ROWS, quotas
from plinth.data.rows import read_rows
from plinth.data.shards import open_split
from plinth.data.stream import Stream

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
PACKINGS = st.sampled_from(["stream", "best_fit"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of four documents, so that a handful of documents makes several."""
    for name in ("plinth.data.shards", "plinth.data.stream"):
        monkeypatch.setattr(f"{name}.BLOCK", 4)


def read_stretch(stream, split, start, n):
    if n == 0:
        return []
    pieces = stream.stretches(np.array([start]), n)
    return np.concatenate([split.tokens[p : p + k] for p, k in zip(pieces.position, pieces.length)]).tolist()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**63), seq_len=st.integers(1, 50), epoch=st.integers(0, 3))
def test_over_an_epoch_each_token_is_once_an_input_and_once_a_target(tmp_path_factory, lengths, seed, seq_len, epoch):
    split = open_split(write_shards(tmp_path_factory.mktemp("s"), lengths))
    stream = Stream(split, None, seed)
    whole, total = Counter(split.tokens.tolist()), split.num_tokens
    assert Counter(read_stretch(stream, split, epoch * total, total)) == whole
    rows_a_deal = max(1, total // seq_len)
    rows = np.arange(rows_a_deal * epoch, rows_a_deal * (epoch + 1))
    inputs, targets, _ = read_rows(split, stream.pieces(rows, seq_len), seq_len)
    straight = read_stretch(stream, split, rows_a_deal * epoch * seq_len, rows_a_deal * seq_len)
    assert Counter(targets.ravel().tolist()) == Counter(straight)
    if total % seq_len == 0:
        assert Counter(inputs.ravel().tolist()) == whole == Counter(targets.ravel().tolist())


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, start=st.integers(0, 500), n=st.integers(0, 300), cut=st.integers(0, 300))
def test_a_stretch_equals_its_pieces(tmp_path_factory, lengths, start, n, cut):
    split = open_split(write_shards(tmp_path_factory.mktemp("s"), lengths))
    stream, cut = Stream(split, None, 5), min(cut, n)
    joined = read_stretch(stream, split, start, cut) + read_stretch(stream, split, start + cut, n - cut)
    assert read_stretch(stream, split, start, n) == joined


def test_documents_stay_whole_and_in_another_order_each_epoch(tmp_path):
    split = open_split(write_shards(tmp_path / "s", [5, 7, 0, 9, 3, 4, 6, 8]))
    stream = Stream(split, None, 1)
    originals = {tuple(split.document(i).tolist()) for i in range(8)}
    orders = []
    for epoch in range(2):
        pieces = []
        for token in read_stretch(stream, split, epoch * split.num_tokens, split.num_tokens):
            if not pieces or pieces[-1][-1] == END:
                pieces.append([])
            pieces[-1].append(token)
        assert {tuple(piece) for piece in pieces} == originals
        orders.append(pieces)
    assert orders[0] != orders[1]


def test_blocks_and_their_documents_both_change_places(tmp_path):
    split = open_split(write_shards(tmp_path / "s", [0] * 64))
    order = Stream(split, None, 2).stretches(np.array([0]), 64).document
    blocks = order // stream_module.BLOCK
    assert [len(set(blocks[i : i + 4])) for i in range(0, 64, 4)] == [1] * 16
    assert blocks[::4].tolist() != sorted(blocks[::4]) and sum(a + 1 == b for a, b in pairwise(order)) < 24


@settings(max_examples=50, deadline=None)
@given(
    lengths=LENGTHS, packing=PACKINGS, seq_len=st.integers(1, 30), step=st.integers(0, 10**9), ranks=st.integers(1, 7), mask=st.booleans()
)
def test_the_shares_of_all_ranks_make_the_whole_batch_at_any_step(tmp_path_factory, lengths, packing, seq_len, step, ranks, mask):
    shards = write_shards(tmp_path_factory.mktemp("s"), lengths)
    loader = TokenLoader(shards, seq_len, 6, seed=1, packing=packing, mask_documents=mask)
    whole = loader.batch(step)
    parts = [TokenLoader(shards, seq_len, 6, seed=1, packing=packing, mask_documents=mask).batch(step, r, ranks) for r in range(ranks)]
    assert len(whole) == 2 + mask
    assert all(torch.equal(tensor, torch.cat(shares)) for tensor, shares in zip(whole, zip(*parts)))


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_batch_is_a_function_of_seed_and_step_alone(tmp_path, packing):
    shards = write_shards(tmp_path / "s", [50, 20, 90, 33, 71])
    forward = TokenLoader(shards, 16, 4, seed=3, packing=packing)
    batches = [forward.batch(step) for step in range(20)]
    for step in (17, 0, 9):
        inputs, targets = TokenLoader(shards, 16, 4, seed=3, packing=packing).batch(step)
        assert torch.equal(inputs, batches[step][0]) and torch.equal(targets, batches[step][1])
        assert inputs.dtype == torch.int64 and inputs.shape == (4, 16)
    assert not torch.equal(TokenLoader(shards, 16, 4, seed=4, packing=packing).batch(0)[0], batches[0][0])


def test_in_a_stream_each_target_is_the_next_input(tmp_path):
    inputs, targets = TokenLoader(write_shards(tmp_path / "s", [50, 20, 90, 33, 71]), 16, 40, seed=3).batch(2)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_rows_do_not_depend_on_how_many_are_asked_for_at_once(tmp_path, packing):
    shards = write_shards(tmp_path / "s", [50, 20, 90, 33, 71])
    big, small = (TokenLoader(shards, 8, n, seed=0, packing=packing) for n in (12, 3))
    assert torch.equal(big.batch(2)[0], torch.cat([small.batch(step)[0] for step in range(8, 12)]))


def test_a_longer_row_holds_as_many_tokens_of_the_stream(tmp_path):
    shards = write_shards(tmp_path / "s", [100] * 9)
    loader = TokenLoader(shards, 8, 4, seed=0)
    inputs, targets = loader.rows(5, 2, seq_len=32)
    assert inputs.shape == (2, 32) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert loader.epochs(9) == pytest.approx(9 * 4 * 8 / 909)


def kind_of_rows(loader, inputs):
    """Return the kinds in each row, by following its tokens back to their documents."""
    split = loader.components[0].split
    kind_of = {int(t): split.kind_names[split.kinds[i]] for i in range(split.num_documents) for t in split.document(i)[:-1]}
    return [{kind_of[t] for t in row if t != END} for row in inputs.tolist()]


def test_kind_weights_set_the_shares_of_the_kinds(tmp_path):
    shards = write_shards(tmp_path / "s", [40, 10, 5] * 10, ["a", "b", "c"] * 10)
    loader = TokenLoader(shards, 16, QUOTA_ROWS, seed=0, kind_weights={"a": 1, "b": 2, "c": 0})
    rows = kind_of_rows(loader, loader.batch(1)[0])
    assert Counter(map(tuple, rows)) == {("a",): 341, ("b",): 683}
    assert torch.equal(loader.rows(7, 5)[0], loader.rows(0, 12)[0][7:])
    accounts = {account.kind: account for account in loader.accounts(1)}
    assert accounts["b"].epochs == pytest.approx(683 * 16 / 110) and accounts["b"].tokens_available == 110
    assert accounts["b"].tokens_unique == 110 and accounts["b"].tokens_repeated == 682 * 16 + 16 - 110


@settings(max_examples=15, deadline=None)
@given(packing=PACKINGS, weights=st.lists(st.integers(1, 50), min_size=3, max_size=3), step=st.integers(0, 400))
def test_folders_get_exact_shares_and_epochs_of_their_own(tmp_path_factory, packing, weights, step):
    root = tmp_path_factory.mktemp("s")
    folders = [write_shards(root / str(i), [9 + i, 4, 20], first_id=1000 * i + 1) for i in range(3)]
    loader = TokenLoader(folders, 8, 16, seed=0, shard_weights=weights, packing=packing)
    targets = loader.rows(0, QUOTA_ROWS)[1]
    sources = Counter(int(row[(row > 0).nonzero()[0, 0]]) // 1000 if (row > 0).any() else "ends" for row in targets)
    expected = quotas(np.array(weights) / sum(weights))
    assert all(sources[i] <= expected[i] for i in range(3)) and sum(sources.values()) == QUOTA_ROWS == expected.sum()
    by_hand = Counter()
    for earlier in range(step):
        by_hand.update(Counter(pieces[0].shards for pieces in loader.documents(earlier)) if step < 40 else {})
    accounts = loader.accounts(step)
    for account, weight in zip(accounts, weights):
        rows = account.epochs * loader._sources[accounts.index(account)].rows_an_epoch(8)
        assert abs(rows - 16 * step * weight / sum(weights)) <= QUOTA_ROWS * 0.26 + 1
        if step < 40:
            assert round(rows) == by_hand[account.shards]


def test_without_weights_folders_count_by_their_tokens(tmp_path):
    folders = [write_shards(tmp_path / "a", [99] * 3), write_shards(tmp_path / "b", [99] * 9, first_id=1000)]
    loader = TokenLoader(folders, 4, 8, seed=0)
    assert [component.share for component in loader.components] == [0.25, 0.75]
    assert [account.epochs for account in loader.accounts(128)] == pytest.approx([128 * 32 / 1200] * 2)
    assert loader.epochs(128) == pytest.approx(128 * 32 / 1200)


def test_each_kind_of_a_mixture_shows_every_token_once_an_epoch(tmp_path):
    shards = write_shards(tmp_path / "s", [31, 13, 20, 7], ["a", "b", "a", "b"])
    loader = TokenLoader(shards, 1, 64, seed=0, kind_weights={"a": 0.5, "b": 0.5})
    seen = Counter(torch.cat([loader.batch(step)[1].ravel() for step in range(32)]).tolist())
    split = loader.components[0].split
    a = [t for i in (0, 2) for t in split.document(i)[:-1].tolist()]
    b = [t for i in (1, 3) for t in split.document(i)[:-1].tolist()]
    assert {seen[t] for t in a} <= {1024 // 53, 1024 // 53 + 1} and {seen[t] for t in b} <= {1024 // 22, 1024 // 22 + 1}


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, packing=PACKINGS, seq_len=st.integers(1, 30), step=st.integers(0, 1000))
def test_the_documents_of_a_step_are_those_that_its_rows_predict(tmp_path_factory, lengths, packing, seq_len, step):
    kinds = ["ab"[i % 2] for i in range(len(lengths))]
    loader = TokenLoader(write_shards(tmp_path_factory.mktemp("s"), lengths, kinds), seq_len, 3, seed=0, packing=packing)
    split = loader.components[0].split
    for row, pieces in zip(loader.batch(step)[1].tolist(), loader.documents(step), strict=True):
        named = [t for p in pieces for t in split.document(p.document)[p.start : p.start + p.length].tolist()]
        assert row[: len(named)] == named and set(row[len(named) :]) <= {-100}
        assert all(p.kind == kinds[p.document] for p in pieces)


def test_a_batch_is_described_by_its_documents(tmp_path):
    loader = TokenLoader(write_shards(tmp_path / "s", [3, 3], ["web", "web"]), 4, 2, seed=0, packing="best_fit")
    lines = loader.describe_batch(0).splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == [f"document {i} (web) of {tmp_path}/s, tokens 0-3" for i in (0, 1)]
    assert [line.split(": ")[0] for line in lines] == ["step 1 row 0", "step 1 row 1"]
    assert loader.describe_batch(0, rows=[1]) == lines[1]


def test_many_epochs_are_warned_of_and_few_are_not(tmp_path):
    shards = write_shards(tmp_path / "s", [15] * 8, ["a", "b"] * 4)
    loader = TokenLoader(shards, 16, 8, seed=0, kind_weights={"a": 1, "b": 0})
    assert loader.warnings(2) == []
    (text,) = loader.warnings(3)
    assert "a of" in text and "would be read 6.0 times" in text and "2305.16264" in text


def test_segments_follow_the_documents(tmp_path):
    loader = TokenLoader(write_shards(tmp_path / "s", [3, 5, 2, 9]), 8, 4, seed=0, mask_documents=True)
    inputs, targets, segments = loader.batch(0)
    for row in range(4):
        numbers = [number for number, piece in enumerate(loader.documents(0)[row]) for _ in range(piece.length)]
        assert segments[row].tolist() == numbers


def test_a_fingerprint_names_all_that_rows_depend_on(tmp_path):
    shards = write_shards(tmp_path / "s", [50, 20])
    options = [{}, {"packing": "best_fit"}, {"mask_documents": True}, {"kind_weights": {"text": 1}}]
    loaders = [TokenLoader(shards, 8, 4, seed=0, **option) for option in options] + [TokenLoader(shards, 8, 4, seed=1)]
    prints = [str(loader.fingerprint()) for loader in loaders]
    assert len(set(prints)) == len(prints) and prints[0] == str(TokenLoader(shards, 8, 4, seed=0).fingerprint())


@settings(max_examples=60, deadline=None)
@given(shares=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
def test_quotas_are_whole_rows_near_the_shares(shares):
    exact = np.array(shares) / sum(shares) * QUOTA_ROWS
    found = quotas(np.array(shares) / sum(shares))
    assert found.sum() == QUOTA_ROWS and found.min() >= 1
    assert (found[exact >= 1] - exact[exact >= 1] < 1 + 1e-6).all()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"kind_weights": {"a": 1}}, "leaves out b"),
        ({"kind_weights": {"a": 1, "b": 1, "z": 1}}, "names z"),
        ({"kind_weights": {"a": 0, "b": 0}}, "needs more than 0"),
        ({"kind_weights": {"a": -1, "b": 2}}, "from 0 up"),
        ({"shard_weights": [1, 2]}, "2 numbers for 1 shards"),
        ({"shard_weights": [0]}, "above 0"),
        ({"packing": "tight"}, "packing='tight' is not one of stream, best_fit"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, text):
    shards = write_shards(tmp_path / "s", [5, 5], ["a", "b"])
    with pytest.raises(UserError, match=text):
        TokenLoader(shards, 2, 2, seed=0, **options)


def test_shards_of_two_tokenizers_are_refused(tmp_path):
    folders = [write_shards(tmp_path / name, [5], tokenizer=name) for name in ("x", "y")]
    with pytest.raises(UserError, match="different tokenizers: .*x by x, .*y by y"):
        TokenLoader(folders, 2, 2, seed=0)


def test_a_split_without_tokens_and_no_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        TokenLoader(write_shards(tmp_path / "s", []), 2, 2, seed=0)
    with pytest.raises(UserError, match="no shards folder"):
        TokenLoader([], 2, 2, seed=0)
