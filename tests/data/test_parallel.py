"""Parallel text: reading in step, and batches whose padding nothing sees."""

import gzip

import pytest
import torch

from plinth.config import UserError
from plinth.data.buckets import UNCOUNTED
from plinth.data.parallel import Marks, Pair, ParallelText, pad_sources, read_pairs
from plinth.tokenizer.train import train_tokenizer

PAIRS = [Pair("a dog runs", "ein Hund läuft"), Pair("two", "zwei"), Pair("the old man reads a book", "der alte Mann liest")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for pair in PAIRS for text in pair] * 5, vocab_size=290)


def write(path, lines, end="\n", packed=False):
    content = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def test_lines_stay_aligned_whatever_separators_stand_in_them(tmp_path):
    source = write(tmp_path / "a.en", ["one\u2028still one", "", "two", "three"], end="\r\n")
    target = write(tmp_path / "a.de.gz", ["eins\x0bnoch eins", "leer", "zwei", "drei"], packed=True)
    pairs, empty = read_pairs([source, target])
    assert pairs == [("one\u2028still one", "eins\x0bnoch eins"), ("two", "zwei"), ("three", "drei")]
    assert empty == 1


def test_several_pairs_of_files_follow_one_another(tmp_path):
    files = [write(tmp_path / name, [name]) for name in ("a.en", "a.de", "b.en", "b.de")]
    assert read_pairs(files)[0] == [("a.en", "a.de"), ("b.en", "b.de")]


def test_what_is_not_parallel_is_refused(tmp_path):
    one, two = write(tmp_path / "one", ["a"]), write(tmp_path / "two", ["b", "c"])
    with pytest.raises(UserError, match="has 1 lines and .* 2"):
        read_pairs([one, two])
    with pytest.raises(UserError, match="name them in pairs"):
        read_pairs([one])
    with pytest.raises(UserError, match="does not exist"):
        read_pairs([one, tmp_path / "absent"])
    (tmp_path / "latin").write_bytes(b"\xe4\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_pairs([one, tmp_path / "latin"])
    write(tmp_path / "cut.gz", ["text"] * 50, packed=True)
    (tmp_path / "cut.gz").write_bytes((tmp_path / "cut.gz").read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs([tmp_path / "cut.gz", one])
    with pytest.raises(UserError, match="no line has text on both sides"):
        read_pairs([write(tmp_path / "blank", [" "]), one])


def test_a_batch_holds_the_sentences_and_their_ends(tokenizer):
    text, marks = ParallelText(PAIRS, tokenizer, tokenizer), Marks.of(tokenizer)
    source_BS, mask_BS, inputs_BT, targets_BT = text.batch([2, 0, 1])
    for row, pair in enumerate([PAIRS[2], PAIRS[0], PAIRS[1]]):
        assert source_BS[row][mask_BS[row]].tolist() == [*tokenizer.encode(pair.source), marks.end_id]
        assert targets_BT[row][targets_BT[row] >= 0].tolist() == [*tokenizer.encode(pair.target), marks.end_id]
        count = len(tokenizer.encode(pair.target)) + 1
        assert inputs_BT[row, :count].tolist() == [marks.start_id, *tokenizer.encode(pair.target)]
        assert (inputs_BT[row, count:] == marks.pad_id).all() and (targets_BT[row, count:] == UNCOUNTED).all()
    assert (source_BS[~mask_BS] == marks.pad_id).all()
    assert source_BS.shape[1] % 8 == inputs_BT.shape[1] % 8 == 0 and source_BS.dtype == torch.int64


def test_long_pairs_are_left_out_and_counted(tokenizer):
    lengths = ParallelText(PAIRS, tokenizer, tokenizer).lengths
    text = ParallelText(PAIRS, tokenizer, tokenizer, max_seq_len=int(sorted(lengths)[1]))
    assert len(text) == 2 and text.num_too_long == 1
    with pytest.raises(UserError, match="none of 3 pairs"):
        ParallelText(PAIRS, tokenizer, tokenizer, max_seq_len=1)


def test_each_side_has_its_own_tokenizer(tokenizer):
    other = train_tokenizer(["zz yy"] * 5, vocab_size=270)
    source_BS, mask_BS, _, targets_BT = ParallelText(PAIRS, tokenizer, other).batch([0])
    assert tokenizer.decode(source_BS[mask_BS].tolist()) == "a dog runs"
    assert other.decode(targets_BT[targets_BT >= 0].tolist()) == "ein Hund läuft"


def test_sources_are_padded_on_the_right():
    tokens, mask = pad_sources([[1, 2, 3], [4]], pad_id=9)
    assert tokens[1].tolist() == [4] + [9] * 7 and mask.sum(1).tolist() == [3, 1]
