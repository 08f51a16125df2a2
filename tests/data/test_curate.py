"""Curation: each gate counted, the split stable, the manifest reproducible, nothing half-written."""

import errno
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.data.curate import CurateConfig, curate, cut_long, cut_text, split_heldout
from plinth.data.documents import Document, conform, document_id, table_of
from plinth.data.sources import read_documents
from plinth.run import file_sha256

WORDS = "time year people way day man thing woman life child world school state family student group country problem hand part".split()


def prose(seed, words=60):
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) + str(chance.choice(["", "s", "ly", "ing", "ed", "ness"])) for _ in range(words)) + ".\n"


def table(num=40, **changes):
    return table_of([Document(prose(i), f"doc{i}.txt", **changes) for i in range(num)])


def read_split(out, split):
    return pq.read_table(out / f"{split}.parquet").to_pylist()


def test_gates_count_what_they_drop_and_all_else_is_kept(tmp_path):
    documents = [Document(prose(i), f"doc{i}.txt") for i in range(40)]
    documents.append(Document(prose(0).replace(" ", "\n"), "copy.txt"))
    documents.append(Document(prose(1, 200), "long.txt"))
    documents.append(Document(prose(1, 200) + " more", "longer.txt"))
    documents.append(Document("short", "short.txt"))
    manifest = curate(table_of(documents), tmp_path / "corpus")
    dropped = {rule["rule"]: rule["dropped"] for rule in manifest["rules"] if rule["dropped"]}
    assert dropped == {"exact_duplicate": 1, "too_short": 1, "near_duplicate": 1}
    kept = read_split(tmp_path / "corpus", "train") + read_split(tmp_path / "corpus", "heldout")
    sources = {row["source"] for row in kept}
    assert sources == {f"doc{i}.txt" for i in range(1, 40)} | {"longer.txt"} | (sources & {"doc0.txt", "copy.txt"})
    assert len(kept) == 41 == manifest["documents_train"] + manifest["documents_heldout"]
    train_bytes = sum(len(row["text"]) for row in read_split(tmp_path / "corpus", "train"))
    assert manifest["documents_in"] == 44 and manifest["bytes_train"] == train_bytes
    remaining = 44
    for rule in manifest["rules"]:
        remaining -= rule["dropped"]
        assert rule["kept"] == remaining
    example = next(rule for rule in manifest["rules"] if rule["rule"] == "near_duplicate")["examples"][0]
    assert example["source"] == "long.txt" and example["reason"] == "nearly the same as longer.txt"


def test_document_ids_and_hashes_are_those_of_the_files(tmp_path):
    manifest = curate(table(), tmp_path / "corpus")
    for split in ("train", "heldout"):
        assert manifest["sha256"][f"{split}.parquet"] == file_sha256(tmp_path / "corpus" / f"{split}.parquet")
        for row in read_split(tmp_path / "corpus", split):
            assert row["doc_id"] == document_id(row["text"]) and len(row["doc_id"]) == 16
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text()) == manifest


def test_the_same_text_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        curate(table(), tmp_path / name)
    for file in ("train.parquet", "heldout.parquet", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_is_kept_does_not_depend_on_the_order(tmp_path):
    documents = [Document(prose(i % 30), f"doc{i}.txt") for i in range(60)]
    results = []
    for seed in (0, 1):
        random.Random(seed).shuffle(documents)
        curate(table_of(documents), tmp_path / str(seed))
        results.append({split: {row["source"] for row in read_split(tmp_path / str(seed), split)} for split in ("train", "heldout")})
    assert results[0] == results[1] and len(results[0]["train"]) + len(results[0]["heldout"]) == 30


def test_more_documents_move_none_to_the_other_side():
    config = CurateConfig(heldout_fraction=0.2)
    ids = [document_id(str(i)) for i in range(400)]
    few, many = (split_heldout(ids[:n], [None] * n, config) for n in (200, 400))
    assert (many[:200] == few).all() and 0.1 < many.mean() < 0.3
    assert (split_heldout(ids, [None] * 400, CurateConfig(heldout_fraction=0.2, seed=1)) != many).any()


def test_documents_of_one_original_are_held_out_together(tmp_path):
    documents = [Document(prose(i), f"file{i // 5}.py:{i}", group=f"file{i // 5}.py") for i in range(100)]
    curate(table_of(documents), tmp_path / "corpus", CurateConfig(heldout_fraction=0.3))
    groups = [{row["group"] for row in read_split(tmp_path / "corpus", split)} for split in ("train", "heldout")]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


def test_both_sides_hold_something_however_few_documents_there_are():
    for num, expected in ((2, 1), (3, 1), (7, 1), (8, 2), (32, 8), (300, 8)):
        heldout = split_heldout([document_id(str(i)) for i in range(num)], [None] * num, CurateConfig(heldout_fraction=0.001))
        assert heldout.sum() == expected
    with pytest.raises(UserError, match="all text is one document"):
        split_heldout(["a", "b"], ["same", "same"], CurateConfig())


def test_a_corpus_of_one_long_file_is_cut_and_loses_nothing():
    book = "\n\n".join(prose(i, 120) for i in range(60))
    cut, num_cut = cut_long(conform(pa.table({"text": [book], "source": ["book.txt"]})), 1_000_000)
    assert num_cut == 1 and len(cut) > 5
    assert "".join(cut["text"].to_pylist()) == book
    assert cut["source"].to_pylist()[:2] == ["book.txt#1", "book.txt#2"]
    assert all(text.endswith("\n\n") for text in cut["text"].to_pylist()[:-1])


@given(st.text(alphabet="ab \n\u00e9\u6f22\U0001f600", max_size=300), st.integers(8, 60))
def test_cutting_loses_nothing_and_keeps_the_limit(text, limit):
    pieces = cut_text(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode("utf-8")) <= limit for piece in pieces)


def test_a_rule_that_drops_much_is_warned_of_and_can_be_left_out(tmp_path):
    tables = [Document(f"{i}: 3.14, 2.71, {i * 7}, 1.41, 99.9, 12", f"{i}.txt") for i in range(20)]
    numbers = table_of([*tables, Document(prose(1), "p.txt")])
    with pytest.raises(UserError, match="1 of 21 documents are left.*low_alphabetic 20.*--skip-rules"):
        curate(numbers, tmp_path / "none")
    manifest = curate(numbers, tmp_path / "all", CurateConfig(skip_rules=("low_alphabetic",), near_duplicate_threshold=None))
    assert manifest["documents_train"] + manifest["documents_heldout"] == 21
    mixed = pa.concat_tables([numbers, table(10)])
    assert "--skip-rules low_alphabetic" in curate(mixed, tmp_path / "mixed")["warnings"][0]


def test_an_intake_is_accounted_for(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(prose(i))
    (folder / "x.bin").write_bytes(b"\0\1")
    (folder / "y.jsonl").write_text('{"text": "' + prose(9).strip() + '", "license": "CC0"}\n{bad\n')
    manifest = curate(read_documents([folder]), tmp_path / "corpus")
    assert [reject["reason"] for reject in manifest["rejected_files"]] == ["binary file"]
    assert manifest["malformed"][0]["count"] == 1
    assert manifest["sources"][0]["documents"] == 6 and manifest["intake"]["files"] == 7
    assert manifest["licences"]["CC0"]["documents"] == 1 and manifest["licences"]["not stated"]["documents"] == 5
    assert manifest["composition"]["text"]["documents"] == 6


def test_an_existing_corpus_is_not_overwritten(tmp_path):
    curate(table(), tmp_path / "corpus")
    with pytest.raises(UserError, match="exists already"):
        curate(table(), tmp_path / "corpus")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    real = pq.write_table

    def full(part, path, **options):
        if path.name.startswith("heldout"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(part, path, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="disk .* is full"):
        curate(table(), tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("heldout_fraction", 0.0, "not above 0"),
        ("near_duplicate_threshold", 0.2, "not between 0.5 and 1"),
        ("max_document_bytes", 10, "under 4096"),
        ("skip_rules", ("low_alfabetic",), "Did you mean low_alphabetic"),
    ],
)
def test_a_bad_field_is_named(field, value, text):
    with pytest.raises(UserError, match=f"{field}.*{text}"):
        CurateConfig(**{field: value})
