"""`plinth data curate` and `plinth data pack` through the real command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import plinth
from plinth.tokenizer.train import train_tokenizer

TEXT = "Sentence number {i} speaks of {j} things, of shoes and ships and sealing wax, of cabbages and kings number {k}.\n"


def run(*arguments):
    source = str(Path(plinth.__file__).parents[1])
    code = "import sys; from plinth.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": source, "COLUMNS": "200"}, timeout=120)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(TEXT.format(i=i * 17, j=i, k=i * i))
    (folder / "noise.bin").write_bytes(b"\0\1\2")
    (folder / "lines.jsonl").write_text("{bad\n" + json.dumps({"text": TEXT.format(i="one", j="two", k="three")}) + "\n")
    return folder


def test_curate_then_pack(tmp_path, texts):
    options = ["--heldout-fraction", 0.2, "--near-duplicate-threshold", "None", "--json"]
    done = run("data", "curate", texts, "--out", tmp_path / "corpus", *options)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["documents_train"] + answer["documents_heldout"] == 31
    assert answer["config"]["heldout_fraction"] == 0.2 and answer["config"]["near_duplicate_threshold"] is None
    train_tokenizer([TEXT], 280).save(tmp_path / "tokenizer")
    done = run("data", "pack", tmp_path / "corpus", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "shards", "--json")
    assert done.returncode == 0, done.stderr
    packed = json.loads(done.stdout.splitlines()[-1])
    assert packed["documents_train"] == answer["documents_train"] and packed["bytes_train"] == answer["bytes_train"]


def test_people_are_shown_what_was_read_and_what_was_not(tmp_path, texts):
    done = run("data", "curate", texts, "--out", tmp_path / "corpus", "--skip-rules", "too_short")
    assert done.returncode == 0, done.stderr
    assert "noise.bin: binary file" in done.stdout and "line 1: not valid JSON" in done.stdout
    assert "near duplicate" in done.stdout and "held out" in done.stdout
    assert "too short" not in done.stdout


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["missing"], "does not exist"),
        (["empty"], "holds no files"),
        (["texts", "--heldout-fraction", "0.9"], "heldout_fraction=0.9"),
        (["texts", "--skip-rules", "too_shrt"], "Did you mean too_short"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(tmp_path, texts, arguments, text):
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / arguments[0], *arguments[1:]]
    done = run("data", "curate", *paths, "--out", tmp_path / "corpus")
    assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "corpus").exists()


def test_an_unknown_option_names_the_nearest(tmp_path, texts):
    done = run("data", "curate", texts, "--out", tmp_path / "corpus", "--heldout-fractoin", "0.1")
    assert done.returncode == 2 and "--heldout-fraction" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_help_names_options_with_units():
    done = run("data", "curate", "--help")
    assert done.returncode == 0
    assert "--heldout-fraction" in done.stdout and "--text-field" in done.stdout and "--skip-rules" in done.stdout
