"""Each mistake gets one clear line, a non-zero exit code, no traceback, and loses nothing."""

import os
import shutil

import pytest

from e2e.command import SMALL, plinth, write_jsonl
from plinth.cli.main import main


def complain(*arguments, code=1, env=None):
    """Run a command that must fail; return its complaint."""
    _, errors = plinth(*arguments, check=code, env=env)
    assert "Traceback" not in errors
    return errors


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    errors = complain("build", tmp_path / "empty", "--out", tmp_path / "out")
    assert "empty" in errors and not (tmp_path / "out").exists()


def test_a_binary_file(tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes(range(256)) * 100)
    errors = complain("build", tmp_path / "data.bin", "--out", tmp_path / "out")
    assert "data.bin" in errors and "binary" in errors and not (tmp_path / "out").exists()


def test_a_path_that_does_not_exist(tmp_path):
    assert "nowhere" in complain("build", tmp_path / "nowhere", "--out", tmp_path / "out")


def test_a_budget_too_small_for_any_training(own_data, tmp_path):
    errors = complain("build", own_data / "texts", "--budget", "0.01s", "--out", tmp_path / "out")
    assert "the smallest useful budget here is" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["banana", "-3m", "0s", "12"])
def test_a_budget_that_is_none(budget, tmp_path):
    assert "budget" in complain("build", f"--budget={budget}", "--out", tmp_path / "out")


def test_an_unknown_option_gets_the_nearest_name(tmp_path):
    assert "--budget" in complain("build", "--bugdet", "3m", "--out", tmp_path / "out", code=2)


def test_an_unknown_verb_gets_the_nearest_name():
    assert "Did you mean build?" in complain("biuld", code=2)


def test_the_first_word_of_several_verbs_lists_them(capsys):
    assert main(["data", "--help"]) == 0 and main(["data"]) == 2
    assert capsys.readouterr().out.count("data curate") == 2
    assert "Did you mean data pack?" in complain("data", "pck", code=2)


def test_a_run_directory_that_exists_is_left_alone(built, own_data):
    out, _, _ = built
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    errors = complain("build", own_data / "texts", "--out", out, "--budget", "1m")
    assert "already holds a run" in errors and "--out" in errors
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_directory_with_other_files_is_left_alone(own_data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "not empty" in complain("build", own_data / "texts", "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_malformed_lines_are_counted_and_three_shown(built, own_data, tmp_path):
    out, _, _ = built
    good = (own_data / "sft.jsonl").read_text().splitlines()[:5]
    bad = ["{", "[]", '{"messages": []}', '{"messages": [{"role": "user"}]}']
    (tmp_path / "mixed.jsonl").write_text("\n".join(good + bad) + "\n")
    _, errors = plinth("sft", out / "pretrain", "--messages", tmp_path / "mixed.jsonl", "--out", tmp_path / "sft", "--epochs", "1")
    assert "4 rejected" in errors and all(f"row {n}" in errors for n in (6, 7, 8)) and "row 9" not in errors


def test_a_missing_key_in_messages(built, tmp_path):
    out, _, _ = built
    file = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "text": "hello"}]}])
    errors = complain("sft", out / "pretrain", "--messages", file, "--out", tmp_path / "sft")
    assert "content" in errors and "row 1" in errors and not (tmp_path / "sft").exists()


def test_a_flipped_byte_in_a_model(built, tmp_path):
    out, _, _ = built
    shutil.copytree(out / "dpo" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    errors = complain("generate", tmp_path / "model", "--prompt", "x")
    assert "model.safetensors" in errors


def test_another_tokenizer_than_packed_the_shards(built, own_data, tmp_path):
    out, _, _ = built
    plinth("tokenizer", "train", own_data / "texts", "--vocab-size", "300", "--out", tmp_path / "tokenizer")
    errors = complain("pretrain", out / "shards", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "run")
    assert "differs from" in errors and "plinth data pack" in errors and not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(os, "fork") or shutil.which("bash") is None, reason="needs a shell with ulimit")
def test_a_full_disk_is_said_and_the_build_goes_on_afterwards(own_data, tmp_path):
    """A limit on the size of written files stands for a full disk: the first weights do not fit."""
    import subprocess
    import sys

    out = tmp_path / "out"
    command = [sys.executable, "-m", "plinth", "build", str(own_data / "texts"), "--budget", "40000tokens", "--out", str(out), *SMALL]
    limited = "trap '' XFSZ; ulimit -f 300; exec " + " ".join(f"'{part}'" for part in command)
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "File too large" in done.stderr
    assert not list(out.rglob("*.safetensors"))
    plinth("build", "--resume", "--out", out)
    assert (out / "report.html").exists() and not (out / "FAILED.txt").exists()
