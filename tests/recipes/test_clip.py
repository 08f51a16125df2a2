"""Contrastive training end to end on drawn shapes: it learns, it resumes bit for bit, and its model is used."""

import json
import math
from dataclasses import replace

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.images import ImageProcessor
from plinth.evaluation.zero_shot import ImageTextModel, recall_at
from plinth.models.dual_encoder import DualEncoderConfig, TextTowerConfig
from plinth.models.hub import load_model
from plinth.models.vision import VisionConfig
from plinth.recipes import clip
from plinth.recipes.clip import ClipConfig, pretrain_clip
from plinth.recipes.shapes_world import write_drawings
from plinth.tasks.shapes import Drawing
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

pytest.importorskip("PIL", reason="pillow is not installed")

MODEL = DualEncoderConfig(
    TextTowerConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_seq_len=16),
    VisionConfig(image_size=16, patch_size=8, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64),
    projection_size=16,
)
DRAWINGS = [Drawing(colour, shape, "large", place) for colour in ("red", "blue") for shape in ("square", "circle")
            for place in ("top left", "bottom right")]  # fmt: skip
TRAIN = TrainConfig(steps=60, warmup_steps=5, dtype="float32", num_threads=2, keep_pre_decay=False,
                    optimizer=OptimizerConfig(name="adamw", lr=0.004))  # fmt: skip
CONFIG = ClipConfig(model=MODEL, train=TRAIN, pairs_per_step=8, micro_batch_size=8, tokenizer_size=300)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_drawings(
        tmp_path_factory.mktemp("world"), DRAWINGS, 1, seed=0, edge=16, templates=["a {size} {colour} {shape} at the {place}"]
    )


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return pretrain_clip(tmp_path_factory.mktemp("run") / "clip", world, CONFIG)


def test_one_batch_is_learnt_and_its_captions_are_found(run, world):
    losses = [record["loss_nats"] for record in run.metrics()]
    assert losses[-1] < 0.1 < math.log(8) < losses[0]  # eight captions to choose from
    assert run.metrics()[-1]["accuracy"] == 1.0 and run.summary["images"] == 8 and run.summary["rejected_rows"] == 0
    found = ImageTextModel.load(run.path)
    vectors = found.images([world / f"{i:05d}.png" for i in range(8)])
    similarity = vectors @ found.texts([drawing.caption() for drawing in DRAWINGS]).t()
    assert recall_at(similarity, torch.eye(8, dtype=torch.bool), (1, 5)) == {1: 1.0, 5: 1.0}
    assert recall_at(similarity.t(), torch.eye(8, dtype=torch.bool), (1,)) == {1: 1.0}


def test_a_run_that_was_stopped_ends_like_one_that_was_not(world, tmp_path, monkeypatch):
    config = replace(CONFIG, train=replace(TRAIN, steps=5, checkpoint_every_s=0.0, dtype="bfloat16"), pairs_per_step=8, micro_batch_size=4)
    whole = load_model(pretrain_clip(tmp_path / "whole", world, config).model_dir)

    class Killed(BaseException):
        pass

    calls = []
    caption_rows = clip.caption_rows

    def killing_rows(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return caption_rows(*arguments)

    monkeypatch.setattr(clip, "caption_rows", killing_rows)
    with pytest.raises(Killed):
        pretrain_clip(tmp_path / "cut", world, config)
    monkeypatch.undo()
    resumed = load_model(pretrain_clip(tmp_path / "cut", world, config, resume=True).model_dir)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_classes_by_name_and_an_ensemble_of_templates(run, world):
    found = ImageTextModel.load(run.path)
    images = [world / f"{i:05d}.png" for i in range(8)]
    templates = [f"a large {{}} {shape} at the {place}" for shape in ("square", "circle") for place in ("top left", "bottom right")]
    ranked = found.classify(images, ["red", "blue"], templates)
    assert [scores[0].name for scores in ranked] == ["red"] * 4 + ["blue"] * 4
    assert sum(score.probability for score in ranked[0]) == pytest.approx(1.0)
    single = [found.class_vectors(["red"], [template]) for template in templates]
    mean = torch.nn.functional.normalize(sum(single) / 4, dim=-1)
    torch.testing.assert_close(found.class_vectors(["red"], templates), mean)
    with pytest.raises(UserError, match="Name at least two"):
        found.classify(images, ["red"])
    with pytest.raises(UserError, match=r"template 'a photo' has no \{\}"):
        found.classify(images, ["red", "blue"], ["a photo"])


def test_recall_worked_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1], [0.3, 0.4, 0.5]])
    right = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert recall_at(similarity, right, (1, 2, 3)) == {1: 0.0, 2: 1.0, 3: 1.0}  # of a tie the first counts as nearer
    with pytest.raises(UserError, match="no query has a right candidate"):
        recall_at(similarity, torch.zeros(3, 3, dtype=torch.bool), (1,))


def test_the_model_folder_says_how_images_are_read(run):
    assert ImageProcessor.load(run.model_dir) == ImageProcessor.for_size(16)
    values = json.loads((run.model_dir / "config.json").read_text())
    assert values["model_type"] == "clip" and values["text_config"]["eos_token_id"] == load_model(run.model_dir).config.text.end_id


def test_the_verb_and_its_mistakes(world, tmp_path, capsys):
    words = ["pretrain", "--family", "clip", "--images", str(world), "--out", str(tmp_path / "run"), "--json", "--train.steps", "2",
             "--pairs-per-step", "4", "--micro-batch-size", "4", "--model.vision.image-size", "16", "--model.vision.num-layers", "1",
             "--model.text.num-layers", "1", "--tokenizer-size", "280"]  # fmt: skip
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["steps"] == 2 and answer["images"] == 8
    assert main(words) == 1 and "already holds a run" in capsys.readouterr().err
    assert main([*words[:4], str(tmp_path / "none"), *words[5:]]) == 1
    assert "none does not exist" in capsys.readouterr().err
    with pytest.raises(UserError, match="micro_batch_size=1"):
        ClipConfig(micro_batch_size=1)


def test_the_verbs_that_use_it(run, world, tmp_path, capsys):
    image = str(world / "00000.png")
    assert main(["image", "classify", str(run.path), image, "--classes", "a red square", "a blue circle", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["images"][0]
    assert shown["image"] == image and len(shown["classes"]) == 2
    assert main(["image", "retrieve", str(run.path), "--images", str(world), "--k", "1", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "text_to_image": {"1": 1.0, "2": 1.0}, "image_to_text": {"1": 1.0, "2": 1.0}, "num_images": 8, "num_captions": 8,
            "rejected_rows": 0,
    }  # fmt: skip
    words = ["image", "retrieve", str(run.path), "--images", str(world), "--text", DRAWINGS[3].caption(), "--k", "2", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["image"].endswith("00003.png")
    assert main(["image", "shapes", str(tmp_path / "world"), "--images-each", "1", "--edge", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == {"train": 154, "held_out": 38}
    assert main(["image", "shapes", str(tmp_path / "world")]) == 1 and "is not empty" in capsys.readouterr().err
