"""Images with texts from each kind of source, and captions as rows of tokens."""

import json

import numpy as np
import pytest

from plinth.config import UserError
from plinth.data.images import save_image
from plinth.data.pictures import Picture, caption_rows, read_pictures
from plinth.models.dual_encoder import TextTowerConfig
from plinth.tokenizer.train import train_tokenizer

pytest.importorskip("PIL", reason="pillow is not installed")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "cats/c.png", "wild_dogs/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_image(np.zeros((4, 4, 3), np.uint8), tmp_path / name)
    return tmp_path


def test_lines_of_json(folder):
    lines = [
        {"image": "a.png", "caption": "one"},
        {"file_name": "b.png", "captions": ["two", "zwei"], "questions": [{"question": "what?", "answer": "it"}]},
        {"image": "b.png", "question": "who?", "answer": "nobody"},
        {"image": "none.png", "caption": "x"},
        {"image": "a.png"},
        {"caption": "x"},
    ]
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n\n")
    pictures, rejects = read_pictures(folder / "all.jsonl")
    assert pictures == [
        Picture(folder / "a.png", ("one",)),
        Picture(folder / "b.png", ("two", "zwei"), (("what?", "it"),)),
        Picture(folder / "b.png", (), (("who?", "nobody"),)),
    ]
    assert rejects.count == 4 and "none.png does not exist" in rejects.describe() and "line 4" in rejects.describe()
    (folder / "all.jsonl").rename(folder / "metadata.jsonl")
    assert read_pictures(folder)[0] == pictures


def test_folders_of_classes_and_texts_beside_images(folder):
    (folder / "a.txt").write_text("a caption\nanother\n")
    pictures, _ = read_pictures(folder)
    assert pictures == [
        Picture(folder / "a.png", ("a caption", "another")),
        Picture(folder / "cats" / "c.png", ("cats",)),
        Picture(folder / "wild_dogs" / "d.png", ("wild dogs",)),
    ]


def test_sources_without_a_picture_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_pictures(tmp_path / "none")
    with pytest.raises(UserError, match="holds no image with a text.*JSON Lines"):
        read_pictures(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(UserError, match="1 rejected"):
        read_pictures(tmp_path / "x.jsonl")


def test_captions_as_rows():
    tokenizer = train_tokenizer(["red green blue " * 9], 300)
    ids = tokenizer.encode_batch(["red", "green blue red"])
    config = TextTowerConfig(vocab_size=300, max_seq_len=5, begin_id=tokenizer.end_of_text_id, end_id=tokenizer.end_id)
    begin, end = config.begin_id, config.end_id
    rows = caption_rows(tokenizer, config, ["red", "green blue red"]).tolist()
    assert rows[0] == ([begin, *ids[0], end] + [end] * 5)[: len(rows[0])]
    assert rows[1] == [begin, *ids[1][:3], end]  # cut, and ended all the same
    legacy = TextTowerConfig(vocab_size=300, max_seq_len=9, begin_id=0, end_id=2)
    assert caption_rows(tokenizer, legacy, ["red"]).tolist() == [[298, *ids[0], 299]]
