"""Own text: every format, every way in which a file can be of no use, and that nothing is lost without being counted."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plinth.config import UserError
from plinth.data.sources import read_documents

TEXT = "The quick brown fox jumps over the lazy dog.\nIt does so every day.\n"


def read(tmp_path, files, **options):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return read_documents([tmp_path], **options)


def texts(intake):
    return intake.table["text"].to_pylist()


def reasons(intake):
    return {os.path.basename(reject.path): reject.reason for reject in intake.rejected}


def test_each_format_gives_its_documents(tmp_path):
    table = pa.table({"content": ["one", "two"], "licence": ["MIT", None]})
    pq.write_table(table, tmp_path / "h.parquet")
    intake = read(
        tmp_path,
        {
            "a.txt": TEXT,
            "b.md": "# Title\n",
            "c.rst": "Title\n=====\n",
            "d.html": "<html><body><p>Hello <b>there</b></p></body></html>",
            "e.py": "x = 1\n",
            "f.jsonl": '{"text": "first", "license": "CC0"}\n\n{"text": "second", "url": "http://x"}\n',
            "g.csv": 'id,text\n1,"a, b"\n2,"c\nd"\n',
            "i.txt.gz": gzip.compress(TEXT.encode()),
            "j.jsonl.gz": gzip.compress(b'{"text": "zipped"}\n'),
            "k.json": '[{"body": "in a list"}]',
            "l.tsv": "text\tn\ntabbed\t1\n",
        },
    )
    expected = [TEXT, "# Title\n", "Title\n=====\n", "Hello there", "x = 1\n", "first", "second", "a, b", "c\nd", "one", "two", TEXT]
    assert texts(intake) == [*expected, "zipped", "in a list", "tabbed"]
    assert not intake.rejected and not intake.malformed
    assert intake.table["kind"].to_pylist().count("code") == 1
    rows = {row["text"]: row for row in intake.table.to_pylist()}
    assert rows["second"]["source"].endswith("f.jsonl:3") and rows["second"]["url"] == "http://x"
    assert rows["first"]["licence"] == "CC0" and rows["one"]["licence"] == "MIT"
    assert intake.counts["documents"] == 15 and intake.counts["files"] == 12
    assert len(intake.examples) == 3 and len({example["source"] for example in intake.examples}) == 3


def test_content_decides_where_the_name_does_not_tell(tmp_path):
    pq.write_table(pa.table({"text": ["in parquet"]}), tmp_path / "data.bin")
    intake = read(
        tmp_path,
        {
            "noname": '{"text": "records"}\n{"text": "more"}\n',
            "page": "<!DOCTYPE html><title>T</title><p>words",
            "plain.log": "just text",
            "wrong.txt": gzip.compress(b"compressed"),
            "braces": "{not json at all}\nx\n",
        },
    )
    assert texts(intake) == ["{not json at all}\nx\n", "in parquet", "records", "more", "T\n\nwords", "just text", "compressed"]


def test_unusable_files_are_counted_with_their_reason(tmp_path):
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    intake = read(
        tmp_path,
        {
            "good.txt": TEXT,
            "empty.txt": b"",
            "blank.txt": b" \n\n",
            "picture.txt": b"\x89PNG\r\n\x1a\n\0\0\0",
            "zeros.txt": b"ab\0cd",
            "noise.md": bytes(range(1, 32)) * 9,
            "latin.txt": "caf\u00e9 au lait".encode("latin-1"),
            "paper.pdf": b"%PDF-1.7 ...",
            "cut.txt.gz": gzip.compress(TEXT.encode() * 50)[:-9],
            "fake.parquet": b"not parquet",
            "broken.parquet": b"PAR1 and then nothing of use",
            "chat.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}\n',
            "fields.jsonl": '{"question": "q", "answer": "a"}\n',
            "bad.json": '{"text": ',
            ".hidden": "x",
            ".git/config": "x",
        },
    )
    assert texts(intake) == [TEXT]
    found = reasons(intake)
    assert len(found) == len(intake.rejected) == intake.counts["files_rejected"] == 16
    assert found["empty.txt"] == "empty file" and found["blank.txt"] == "no text in it"
    assert "image" in found["picture.txt"] and found["zeros.txt"] == found["noise.md"] == "binary file"
    assert "byte 0xe9 at offset 3" in found["latin.txt"] and "iconv" in found["latin.txt"]
    assert "PDF" in found["paper.pdf"] and "damaged gzip" in found["cut.txt.gz"]
    assert "not" in found["fake.parquet"] and "damaged parquet" in found["broken.parquet"]
    assert "--sft" in found["chat.jsonl"]
    assert "question, answer" in found["fields.jsonl"] and "--text-field" in found["fields.jsonl"]
    assert "hidden" in found[".hidden"] and "hidden" in found[".git"] and "broken link" in found["dangling.txt"]


def test_malformed_lines_are_counted_and_the_first_three_shown(tmp_path):
    lines = ['{"text": "good"}', "{oops", "[1]", '{"text": 5}', '{"other": "x", "b": 1}', '{"text": "\\ud800"}', '{"text": "also"}']
    intake = read(tmp_path, {"a.jsonl": "\n".join(lines).encode() + b'\n{"text": "\xff"}\n'})
    assert texts(intake) == ["good", "also"]
    (bad,) = intake.malformed
    assert bad.count == intake.counts["malformed"] == 6
    assert [line.split(":")[0] for line in bad.first] == ["line 2", "line 3", "line 4"]
    assert "not valid JSON" in bad.first[0] and "column 2" in bad.first[0]


def test_rows_of_the_wrong_width_are_counted(tmp_path):
    intake = read(tmp_path, {"a.csv": "id;text\n1;good\n2\n3;x;y\n"})
    assert texts(intake) == ["good"]
    assert intake.malformed[0].first == ["line 3: 1 fields where the header has 2", "line 4: 3 fields where the header has 2"]


def test_documents_before_the_damage_of_a_stream_are_kept(tmp_path):
    lines = "".join(json.dumps({"text": f"{i} {os.urandom(200).hex()}"}) + "\n" for i in range(2000))
    intake = read(tmp_path, {"a.jsonl.gz": gzip.compress(lines.encode())[:-2000]})
    assert 0 < len(intake.table) < 2000
    assert f"the {len(intake.table)} documents before that are kept" in intake.rejected[0].reason


def test_named_text_fields_are_joined(tmp_path):
    intake = read(tmp_path, {"a.jsonl": '{"q": "Why?", "a": "So."}\n'}, text_fields=("q", "a"))
    assert texts(intake) == ["Why?\n\nSo."]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_honoured(tmp_path, encoding):
    intake = read(tmp_path, {"a.txt": "na\u00efve \u6f22\u5b57\r\nline\rend".encode(encoding)})
    assert texts(intake) == ["na\u00efve \u6f22\u5b57\nline\nend"]


def test_a_declared_encoding_is_honoured(tmp_path):
    page = '<html><head><meta charset="iso-8859-1"></head><p>caf\u00e9'
    intake = read(tmp_path, {"a.html": page.encode("latin-1"), "b.py": "# coding: latin-1\nx = '\u00e9'\n".encode("latin-1")})
    assert texts(intake) == ["caf\u00e9", "# coding: latin-1\nx = '\u00e9'\n"]


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert texts(read_documents([tmp_path, tmp_path / "a.txt", str(tmp_path)])) == [TEXT]


def test_each_named_path_is_recorded_with_a_hash_of_what_it_gave(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    first = read_documents([tmp_path]).sources
    (tmp_path / "a.txt").write_text(TEXT + "!")
    second = read_documents([tmp_path]).sources
    assert first[0]["path"] == str(tmp_path) and first[0]["documents"] == 1 and first[0]["bytes"] == len(TEXT)
    assert first[0]["sha256"] != second[0]["sha256"]


def test_a_name_that_is_no_unicode_does_not_stop_the_reading(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
            file.write(TEXT)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert read_documents([tmp_path]).table["source"][0].as_py().endswith("caf\ufffd.txt")


def test_errors_say_the_way_out(tmp_path):
    with pytest.raises(UserError, match="holds no files"):
        read_documents([tmp_path])
    (tmp_path / "essay.txt").write_text(TEXT)
    with pytest.raises(UserError, match="does not exist. Did you mean essay.txt"):
        read_documents([tmp_path / "esay.txt"])
    (tmp_path / "binary.dat").write_bytes(b"\0\1\2")
    with pytest.raises(UserError, match="none of 1 files could be used: .*binary file.*Readable are"):
        read_documents([tmp_path / "binary.dat"])
    with pytest.raises(UserError, match="no text was named"):
        read_documents([])
