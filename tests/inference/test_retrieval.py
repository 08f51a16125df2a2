"""Search: the right document with its source, passages that are the text, an index that follows its corpus."""

import json
import math
import sys

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.documents import Document, document_id, table_of
from plinth.inference.retrieval import SearchIndex, excerpt, find_corpus, passages, words

pytest.importorskip("bm25s", reason="bm25s is not installed")
FILLER = "Nothing of note happened on that day, and the ship sailed on.\n\n"
DOCUMENTS = [
    Document("The lighthouse of Portland burns whale oil.", "ship/log.txt:1", "text", "CC0-1.0", "https://example.org/1"),
    Document("def read_text(path):\n    return open(path).read()\n", "lib/files.py", "code", "MIT"),
    Document(FILLER * 60 + "A kraken was seen at dusk.\n\n" + FILLER * 60, "ship/log.txt:2"),
    Document("東京タワーは赤い。Größe zählt.", "notes.md", "docs"),
    Document("", "empty.txt"),
    Document("The ship, the ship, the ship!", "ship/song.txt"),
]


def write(folder, documents):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(documents), folder / "train.parquet", row_group_size=2)
    return folder


@pytest.fixture
def build(tmp_path):
    write(tmp_path / "build" / "corpus", DOCUMENTS)
    return tmp_path / "build"


@pytest.mark.parametrize(
    ("query", "source"),
    [
        ("what oil does the lighthouse burn", "ship/log.txt:1"),
        ("read_text", "lib/files.py"),
        ("TEXT read", "lib/files.py"),
        ("a kraken", "ship/log.txt:2"),
        ("東京", "notes.md"),
        ("GRÖSSE", "notes.md"),
    ],
)
def test_a_query_finds_its_document(build, query, source):
    found = SearchIndex.open(build).search(query, 3)
    document = next(one for one in DOCUMENTS if one.source == source)
    assert found[0].source == source and found[0].id == document_id(document.text)
    assert (found[0].kind, found[0].licence, found[0].url) == (document.kind, document.licence, document.url)
    assert document.text[found[0].start :].startswith(found[0].text)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert len({one.source for one in found}) == len(found)


def test_the_passage_that_holds_the_words_is_shown(build):
    found = SearchIndex.open(build).search("kraken dusk", 1)[0]
    assert "kraken was seen at dusk" in found.excerpt and found.start > 0
    assert found.excerpt.startswith("…") or found.text.startswith("A kraken") or len(found.text) <= 1000


def test_scores_are_those_of_the_formula(tmp_path):
    texts = ["a b b c", "b d", "e f g", "b b b b"]
    corpus = write(tmp_path / "corpus", [Document(text, str(i)) for i, text in enumerate(texts)])
    found = {one.source: one.score for one in SearchIndex.open(corpus).search("b d", 4)}
    mean = sum(len(text.split()) for text in texts) / len(texts)

    def score(text: str) -> float:
        total, row = 0.0, text.split()
        for word in ("b", "d"):
            holders, count = sum(word in other.split() for other in texts), row.count(word)
            rarity = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            total += rarity * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(row) / mean))
        return total

    wanted = {str(i): pytest.approx(score(text), rel=1e-5) for i, text in enumerate(texts) if score(text) > 0}
    assert found == wanted


@given(st.text(alphabet="ab .\n", max_size=300), st.integers(2, 40))
def test_passages_are_the_text(text, limit):
    spans = passages(text, limit)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(0 < end - start <= limit for start, end in spans)


def test_passages_end_where_a_reader_would():
    text = "one two\n\nthree four\nfive six"
    assert [text[start:end] for start, end in passages(text, 14)] == ["one two\n\n", "three four\n", "five six"]


@given(st.text(max_size=200), st.text(max_size=30))
def test_an_excerpt_is_one_line_of_bounded_length(text, query):
    line = excerpt(text, query, 40)
    assert "\n" not in line and len(line) <= 44


def test_words_are_folded_and_cut():
    assert words("os.path.join_all(STRASSE, Straße, Pythonの2)") == ["os", "path", "join", "all", "strasse", "strasse", "python", "の", "2"]


def test_the_index_is_kept_and_follows_the_corpus(build):
    SearchIndex.open(build)
    manifest = build / "corpus_index" / "manifest.json"
    made = manifest.stat().st_ino
    assert SearchIndex.open(build).search("kraken")
    assert manifest.stat().st_ino == made
    write(build / "corpus", [Document("A unicorn.", "new.txt")])
    index = SearchIndex.open(build)
    assert manifest.stat().st_ino != made
    assert not index.search("kraken") and index.search("unicorn")[0].source == "new.txt"
    assert sorted(path.name for path in build.iterdir()) == ["corpus", "corpus_index"]
    assert sorted(path.name for path in (build / "corpus").iterdir()) == ["train.parquet"]  # whose hash is in the lineage


def test_a_damaged_index_is_named(build):
    SearchIndex.open(build)
    (build / "corpus_index" / "passages.npy").write_bytes(b"no")
    with pytest.raises(UserError, match="corpus_index is damaged .* Delete it"):
        SearchIndex.open(build)


def test_the_corpus_of_a_stage_or_a_model_is_its_builds(build):
    model = build / "sft" / "model"
    model.mkdir(parents=True)
    for folder in (build / "sft", model):
        (folder / "config.json").write_text("{}")
    assert {find_corpus(path) for path in (build, build / "corpus", build / "sft", model)} == {(build / "corpus").absolute()}
    (build / "other").mkdir()
    with pytest.raises(UserError, match="other has no corpus"):
        find_corpus(build / "other")
    with pytest.raises(UserError, match="absent does not exist"):
        find_corpus(build / "absent")


def test_mistakes(build, tmp_path):
    index = SearchIndex.open(build)
    with pytest.raises(UserError, match="has no word"):
        index.search("?!")
    with pytest.raises(UserError, match="top=0"):
        index.search("ship", 0)
    with pytest.raises(UserError, match="holds no word"):
        SearchIndex.open(write(tmp_path / "none", [Document("?!", "a")]))


def test_without_the_library_the_extra_is_named(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'plinth-fm\[retrieval\]'"):
        SearchIndex.open(build)


def test_the_verb(build, capsys):
    assert main(["search", str(build), "whale oil", "--top", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["results"][0]["source"] == "ship/log.txt:1" and result["results"][0]["licence"] == "CC0-1.0"
    assert main(["search", str(build), "whale oil"]) == 0
    shown = capsys.readouterr().out
    assert "1. ship/log.txt:1" in shown and "CC0-1.0" in shown and "burns whale oil" in shown
    assert main(["search", str(build), "zzz"]) == 0
    assert "holds a word of the query" in capsys.readouterr().out
    assert main(["search", str(build / "absent"), "x"]) == 1
    assert "absent does not exist" in capsys.readouterr().err
