"""`plinth tokenizer train` through the real command line."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from plinth.cli.main import main
from plinth.tokenizer.encode import Tokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, texts in {"train": ["the cat and the hat\n" * 50, "def f(x):\n    return x\n"], "heldout": ["the hat and the bat"]}.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{split}.parquet")
    return folder


def test_trains_from_a_corpus(corpus, tmp_path, capsys):
    assert main(["tokenizer", "train", str(corpus), "--vocab-size", "300", "--out", str(tmp_path / "tok"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert result["sha256"] == tokenizer.sha256
    assert result["documents"] == 2
    assert result["text_bytes"] == 50 * 20 + 23
    assert result["measured_on"] == "held-out documents"
    assert result["bytes_per_token"] == round(19 / len(tokenizer.encode("the hat and the bat")), 4)
    assert json.loads((tmp_path / "tok" / "manifest.json").read_text())["parents"][0]["sha256"]


def test_speaks_to_people_without_json(corpus, tmp_path, capsys):
    assert main(["tokenizer", "train", str(corpus), "--vocab-size", "5000", "--out", str(tmp_path / "tok")]) == 0
    shown = capsys.readouterr().out
    assert "5,000 were asked for" in shown
    assert "for instance: the| hat" in shown


def test_refuses_an_existing_folder_and_a_tiny_vocabulary(corpus, tmp_path, capsys):
    arguments = ["tokenizer", "train", str(corpus), "--out", str(corpus)]
    assert main(arguments) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "tok"), "--vocab-size", "9"]) == 1
    assert "vocab_size=9 is below 262" in capsys.readouterr().err
    assert not (tmp_path / "tok").exists()


def test_names_a_damaged_corpus(corpus, tmp_path, capsys):
    (corpus / "heldout.parquet").write_bytes(b"PAR1 not really")
    assert main(["tokenizer", "train", str(corpus), "--out", str(tmp_path / "tok")]) == 1
    assert "heldout.parquet is not a corpus table" in capsys.readouterr().err


def test_trains_from_text_files(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one two three two one\n" * 20)
    assert main(["tokenizer", "train", str(tmp_path / "a.txt"), "--vocab-size", "280", "--out", str(tmp_path / "tok"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == 1
