"""A teacher's file whose writing is cut short: what is whole in it is kept, the rest is computed, and the bits are those of one go."""

import json
import shutil

import pytest
import torch

from cut_short import killed_at
from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.posttraining import teacher_file, teacher_parts
from plinth.posttraining.distill_config import TeacherFileConfig
from plinth.posttraining.teacher_file import write_teacher_file
from plinth.posttraining.teacher_parts import Parts, is_teacher_file
from plinth.run import Run
from plinth.tokenizer.train import train_tokenizer

WORDS = ["copy", "move", "read", "write", "open", "close", "seek", "flush"]
CONFIG = TeacherFileConfig(top_k=5, micro_batch_size=2, num_threads=1)
PARTS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher_parts")
    tokenizer = train_tokenizer([f"It does {word} things." for word in WORDS] * 3, 300)
    for seed, name in enumerate(("teacher", "other")):
        config = DecoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
                               intermediate_size=64, max_seq_len=64)  # fmt: skip
        save_model(Transformer(config).init_weights(torch.Generator().manual_seed(seed)), tokenizer, folder / name)
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"text": f"It does {word} things. " * (1 + i % 3)}) + "\n" for i, word in enumerate(WORDS))
    )
    write(folder, folder / "whole")
    return folder


def write(world, out, config=CONFIG, *, teacher="teacher", data="data.jsonl", **options):
    return write_teacher_file(out, world / teacher, world / data, config, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cut(world, tmp_path):
    """A file of which two or three of four micro-batches are written."""
    with killed_at(3, teacher_file, "top_tokens"):
        write(world, tmp_path / "cut")
    return tmp_path / "cut"


def lines_of(out):
    """Return how many micro-batches progress.jsonl has; where one raised, the thread may have begun the next."""
    return (out / teacher_parts.PROGRESS).read_text().count("\n") - 1


@pytest.mark.parametrize("owner,name,call,least,most", [
    (teacher_file, "top_tokens", 1, 0, 3), (teacher_file, "top_tokens", 4, 3, 3), (teacher_file, "fill_arrays", 1, 0, 0),
    (Parts, "finish", 1, PARTS, PARTS),
])  # fmt: skip
def test_killed_and_resumed_equals_never_killed(world, tmp_path, monkeypatch, owner, name, call, least, most):
    """Wherever it was cut, nothing is computed twice, and the configuration is that of the first call."""
    out, told, computed = tmp_path / "cut", [], []
    with killed_at(call, owner, name):
        write(world, out)
    whole, top_tokens = lines_of(out), teacher_file.top_tokens
    assert least <= whole <= most
    monkeypatch.setattr(teacher_file, "top_tokens", lambda *given: (computed.append(1), top_tokens(*given))[1])
    found = write(world, out, TeacherFileConfig(top_k=9), resume=True, warn=told.append)
    assert contents(out) == contents(world / "whole") and found["top_k"] == 5 and len(computed) == PARTS - whole
    assert told == ([f"{out}: {whole} of {PARTS} micro-batches are there; going on with the others."] if whole else [])
    assert write(world, out, resume=True) == found


def test_a_process_that_dies_behind_its_last_word_left_a_whole_file(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "cut")
    (tmp_path / "cut" / teacher_parts.PROGRESS).write_text("{}\n")
    assert is_teacher_file(tmp_path / "cut")
    write(world, tmp_path / "cut", resume=True)
    assert contents(tmp_path / "cut") == contents(world / "whole")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage,lost", [
    (lambda cut: flip(cut / "log_probs.npy", 200), 1),  # in the rows of the first example, which is among the shortest
    (lambda cut: (cut / "ids.npy").write_bytes((cut / "ids.npy").read_bytes()[:190]), 1),
    (lambda cut: flip(cut / teacher_parts.PROGRESS, -2), 0),  # a line that is no JSON any more
    (lambda cut: (cut / teacher_parts.PROGRESS).write_bytes((cut / teacher_parts.PROGRESS).read_bytes()[:-3]), 0),  # cut off
    (lambda cut: (cut / teacher_parts.PROGRESS).open("a").write('{"part": 99, "crc32": 1}\n[]\n'), 0),
])  # fmt: skip
def test_what_is_not_whole_is_computed_again(world, cut, damage, lost):
    damage(cut)
    told = []
    write(world, cut, resume=True, warn=told.append)
    assert contents(cut) == contents(world / "whole")
    assert sum("are not as they were written, and are computed again" in text for text in told) == lost


@pytest.mark.parametrize("damage,text", [
    (lambda cut: (cut / "rest.npy").write_bytes(b"\x93NUMPY"), "rest.npy is missing or damaged .*Remove .* and begin again"),
    (lambda cut: flip(cut / "ids.npy", 9), "ids.npy is missing or damaged"),
    (lambda cut: (cut / "ids.npy").unlink(), "ids.npy is missing or damaged"),
    (lambda cut: shutil.copy(cut / "rest.npy", cut / "ids.npy"), r"ids.npy holds float32 of shape .* not int32 of shape .* of this file"),
    (lambda cut: flip(cut / teacher_parts.PROGRESS, 0), "progress.jsonl is damaged, or of another version .* Remove"),
    (lambda cut: (cut / teacher_parts.PROGRESS).unlink(), "holds no teacher's file to go on with. Leave out --resume"),
])  # fmt: skip
def test_a_file_that_cannot_be_gone_on_with_is_refused(world, cut, damage, text):
    damage(cut)
    with pytest.raises(UserError, match=text):
        write(world, cut, resume=True)


def test_what_was_begun_with_other_things_is_refused(world, cut, tmp_path):
    (world / "less.jsonl").write_text("".join((world / "data.jsonl").read_text().splitlines(True)[:3]))
    before = contents(cut)
    for folder in (cut, world / "whole"):
        with pytest.raises(UserError, match=r"was begun with teacher \w{8}, and now it is \w{8}. Name the same as then, or another --out"):
            write(world, folder, teacher="other", resume=True)
        with pytest.raises(UserError, match=r"was begun with data \w{8}, and now it is"):
            write(world, folder, data="less.jsonl", resume=True)
    with pytest.raises(UserError, match="holds an unfinished teacher's file. Pass --resume to go on with it, or --out with a new name"):
        write(world, cut)
    with pytest.raises(UserError, match="holds no teacher's file to go on with"):
        write(world, tmp_path / "none", resume=True)
    with Run(cut).lock(), pytest.raises(UserError, match="is being written by another process"):
        write(world, cut, resume=True)
    assert contents(cut) == before


def test_the_command_goes_on_and_an_unfinished_file_is_no_teacher(world, cut, capsys):
    data = ["--data", str(world / "data.jsonl")]
    assert main(["distill", str(world / "other"), "--teacher", str(cut), *data, "--out", str(cut.parent / "run")]) == 1
    assert "is an unfinished teacher's file. Finish it: the same `plinth distill score` with --resume." in capsys.readouterr().err
    assert main(["distill", "score", str(world / "teacher"), *data, "--out", str(cut), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == json.loads((world / "whole" / "teacher.json").read_text())["positions"]
    assert {name: content for name, content in contents(cut).items() if name != "teacher.json"}.items() <= contents(world / "whole").items()
