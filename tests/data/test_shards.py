"""Shards: what is packed is what was written, each token accounted for."""

import errno

import numpy as np
import pytest

from plinth.config import UserError
from plinth.data.curate import curate
from plinth.data.documents import Document, table_of
from plinth.data.shards import open_split, pack_corpus, token_dtype
from plinth.run import file_sha256
from plinth.tokenizer.train import train_tokenizer

TEXTS = [f"Document {i} says: <|endoftext|> is {i * i} caf\u00e9s, \u6f22\u5b57 and {'abc' * (i % 7)}.\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("packed")
    curate(table_of([Document(text, f"{i}.txt", "docs" if i % 3 else "text") for i, text in enumerate(TEXTS)]), folder / "corpus")
    return folder, pack_corpus(folder / "corpus", tokenizer, folder / "shards")


def test_every_document_decodes_to_its_text_and_ends_once(packed, tokenizer):
    folder, manifest = packed
    found = []
    for split in ("train", "heldout"):
        opened = open_split(folder / "shards", split)
        assert opened.num_documents == manifest[f"documents_{split}"] and opened.num_tokens == manifest[f"tokens_{split}"]
        for index in range(opened.num_documents):
            ids = opened.document(index)
            assert ids[-1] == tokenizer.end_of_text_id and (ids == tokenizer.end_of_text_id).sum() == 1
            text = tokenizer.decode(ids[:-1].tolist())
            assert len(text.encode()) == opened.num_bytes[index] and len(text) == opened.num_chars[index]
            assert opened.kind_names[opened.kinds[index]] == ("docs" if int(text.split()[1]) % 3 else "text")
            found.append(text)
    assert sorted(found) == sorted(TEXTS)


def test_backwards_each_document_is_turned_round_and_still_ends_once(packed, tokenizer):
    folder, _ = packed
    assert pack_corpus(folder / "corpus", tokenizer, folder / "backwards", backwards=True)["backwards"]
    there, back = (open_split(folder / name, "train") for name in ("shards", "backwards"))
    assert np.array_equal(there.offsets, back.offsets)
    for index in range(there.num_documents):
        assert np.array_equal(there.document(index)[:-1][::-1], back.document(index)[:-1])
        assert back.document(index)[-1] == tokenizer.end_of_text_id


def test_the_manifest_adds_up(packed, tokenizer):
    folder, manifest = packed
    for split in ("train", "heldout"):
        for unit in ("documents", "tokens", "bytes"):
            assert sum(entry[unit] for entry in manifest["mixture"][split].values()) == manifest[f"{unit}_{split}"]
        assert manifest["sha256"][f"{split}.bin"] == file_sha256(folder / "shards" / f"{split}.bin")
    assert manifest["tokenizer_sha256"] == tokenizer.sha256 and manifest["vocab_size"] == tokenizer.vocab_size


def test_ids_are_stored_in_the_smallest_type_that_holds_them():
    assert token_dtype(65536) == np.dtype("<u2") and token_dtype(65537) == np.dtype("<u4")


def test_shards_that_are_not_whole_are_refused(packed, tokenizer, tmp_path):
    folder, _ = packed
    pack_corpus(folder / "corpus", tokenizer, tmp_path / "cut")
    file = tmp_path / "cut" / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="train.bin has .* bytes where .* tokens"):
        open_split(tmp_path / "cut")
    file.unlink()
    with pytest.raises(UserError, match="train.bin does not exist"):
        open_split(tmp_path / "cut")
    with pytest.raises(UserError, match="holds no token shards"):
        open_split(tmp_path)


def test_bad_input_is_refused_with_the_way_out(packed, tokenizer, tmp_path):
    folder, _ = packed
    with pytest.raises(UserError, match="holds no corpus"):
        pack_corpus(tmp_path, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        pack_corpus(folder / "corpus", tokenizer, folder / "shards")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="train.parquet is damaged"):
        pack_corpus(broken, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(packed, tokenizer, tmp_path, monkeypatch):
    def full(file, header):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match="disk .* is full"):
        pack_corpus(packed[0] / "corpus", tokenizer, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []
