"""A decoder taught to see, end to end on drawn shapes: what is held stays, it learns, resumes bit for bit, and answers."""

import json
from dataclasses import replace

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.image_questions import IMAGE, question_tokens, with_image_token
from plinth.data.images import ImageProcessor
from plinth.data.pictures import TextAndImageFiles
from plinth.inference.sampling_params import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.dual_encoder import DualEncoder, DualEncoderConfig, TextTowerConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.models.vision import VisionConfig
from plinth.models.vision_language import VisionLanguageConfig
from plinth.recipes import llava
from plinth.recipes.asking_images import ask_images
from plinth.recipes.llava import LlavaConfig, grow_vocabulary, join_parts, load_vision_language, train_llava
from plinth.recipes.shapes_world import write_drawings
from plinth.tasks.shapes import Drawing
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

pytest.importorskip("PIL", reason="pillow is not installed")

DRAWINGS = [Drawing(colour, "square", "large", place) for colour in ("red", "blue") for place in ("top left", "bottom right")]
TRAIN = TrainConfig(steps=45, warmup_steps=5, dtype="bfloat16", num_threads=2, keep_pre_decay=False,
                    optimizer=OptimizerConfig(name="muon", lr=0.004))  # fmt: skip
CONFIG = LlavaConfig(train=TRAIN, trained="all", questions_per_step=16, micro_batch_size=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_drawings(tmp_path_factory.mktemp("world"), DRAWINGS, 1, seed=0, edge=16)


@pytest.fixture(scope="module")
def parts(world, tmp_path_factory):
    """A decoder and a pair of towers, both new."""
    folder = tmp_path_factory.mktemp("parts")
    generator = torch.Generator().manual_seed(0)
    tokenizer = train_tokenizer([(world / "metadata.jsonl").read_text()], 300)
    decoder = DecoderConfig(tokenizer.vocab_size, 64, 2, 2, 2, 32, 128, 64)
    language = Transformer(decoder).init_weights(generator)
    for block in language.layers:  # new blocks are the identity, which sees no image
        torch.nn.init.normal_(block.attention.out.weight, 0.0, 0.1, generator=generator)
    save_model(language, tokenizer, folder / "decoder")
    towers = DualEncoderConfig(TextTowerConfig(tokenizer.vocab_size, 32, 1, 2, 64, 16), VisionConfig(16, 8, 3, 64, 2, 2, 128), 16)
    files = TextAndImageFiles(tokenizer, ImageProcessor.for_size(16))
    save_model(DualEncoder(towers).init_weights(generator), files, folder / "vision")
    return {"decoder": folder / "decoder", "vision": folder / "vision"}


def test_only_the_projector_moves_in_the_first_stage(world, parts, tmp_path):
    config = replace(CONFIG, trained="projector", train=replace(TRAIN, steps=3))
    run = train_llava(tmp_path / "run", world, config, **parts)
    before, after = join_parts(parts["decoder"], parts["vision"], config)[0].state_dict(), load_model(run.model_dir).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("projector.")}  # bf16 rounds nothing of what is held
    assert run.summary["trained_params"] == sum(before[name].numel() for name in moved)
    assert run.summary["questions"] == 4 * 8


def test_it_learns_to_answer_and_the_second_stage_goes_on(world, parts, tmp_path):
    first = train_llava(tmp_path / "first", world, replace(CONFIG, train=replace(TRAIN, steps=25)), **parts)
    run = train_llava(tmp_path / "second", world, CONFIG, start=first.path)
    losses = [record["loss_nats"] for record in run.metrics()]
    assert losses[0] < first.metrics()[0]["loss_nats"] / 2 and losses[-1] < 0.1
    asked = [(world / f"{i:05d}.png", question, answer) for i, drawing in enumerate(DRAWINGS) for question, answer in drawing.questions()]
    answers = ask_images(run.path, [(image, question) for image, question, _ in asked], SamplingParams(temperature=0.0, max_tokens=20))
    assert [answer.text for answer in answers] == [answer for _, _, answer in asked]
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_a_run_that_was_stopped_ends_like_one_that_was_not(world, parts, tmp_path, monkeypatch):
    config = replace(CONFIG, train=replace(TRAIN, steps=5, checkpoint_every_s=0.0), trained="decoder")
    whole = load_model(train_llava(tmp_path / "whole", world, config, **parts).model_dir)

    class Killed(BaseException):
        pass

    calls = []
    pad_rows = llava.pad_rows

    def killing_rows(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return pad_rows(*arguments)

    monkeypatch.setattr(llava, "pad_rows", killing_rows)
    with pytest.raises(Killed):
        train_llava(tmp_path / "cut", world, config, **parts)
    monkeypatch.undo()
    resumed = load_model(train_llava(tmp_path / "cut", world, config, resume=True, **parts).model_dir)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_the_image_token_stands_behind_the_vocabulary_and_the_rest_is_as_before(parts):
    model, files = join_parts(parts["decoder"], parts["vision"], CONFIG)
    tokenizer, old = files.tokenizer, load_model(parts["decoder"])
    assert tokenizer.token_id(IMAGE) == model.config.image_id == old.config.vocab_size and model.config.vocab_size % 64 == 0
    assert with_image_token(tokenizer) is tokenizer and tokenizer.encode(f"a {IMAGE}")[-1] != model.config.image_id
    tokens = torch.tensor([tokenizer.encode("a red square")])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens))[..., : old.config.vocab_size], old.logits(old(tokens)))
    assert grow_vocabulary(old, 4) is old


def test_questions_as_tokens(parts):
    model, files = join_parts(parts["decoder"], parts["vision"], CONFIG)
    tokenizer, config = files.tokenizer, model.config
    rendered = question_tokens(tokenizer, config, "Where?", "top left")
    question, answer = tokenizer.encode("Where?"), tokenizer.encode("top left")
    image = [config.image_id] * 4
    head = [tokenizer.user_id, *image, *question, tokenizer.end_id, tokenizer.assistant_id]
    assert rendered.tokens == [*head, *answer, tokenizer.end_id]
    assert rendered.loss_mask == [False] * len(head) + [True] * (len(answer) + 1)
    assert question_tokens(tokenizer, config, "Where?").tokens == head
    written = question_tokens(tokenizer, config, "Where?", prompt="Q: <image> {question}").tokens
    assert written == [*tokenizer.encode("Q: "), *image, *tokenizer.encode(" Where?")]
    with pytest.raises(UserError, match="must hold <image> once"):
        question_tokens(tokenizer, config, "Where?", prompt="{question}")
    with pytest.raises(UserError, match=r"4 of them the image's, exceeds max_seq_len=64"):
        question_tokens(tokenizer, config, "Where? " * 60)
    assert VisionLanguageConfig(config.vision, config.decoder, class_token=True).image_tokens == 5


def test_verbs_and_mistakes(world, parts, tmp_path, capsys):
    words = ["pretrain", "--family", "llava", "--images", str(world), "--out", str(tmp_path / "run"), "--decoder", str(parts["decoder"]),
             "--vision", str(parts["vision"]), "--train.steps", "2", "--json"]  # fmt: skip
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["questions"] == 32
    image = str(world / "00000.png")
    assert main(["image", "ask", str(tmp_path / "run"), image, "Where is it?", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completion_tokens"] <= 3
    for wrong, said in (
        (["image", "ask", str(parts["vision"]), image, "Where?"], "holds a DualEncoder, not a decoder that sees"),
        (["image", "ask", str(tmp_path / "run"), str(world / "none.png"), "Where?"], "none.png does not exist"),
        (["image", "classify", str(tmp_path / "run"), image, "--classes", "a", "b"], "not a text and a vision tower"),
        ([*words[:5], "--out", str(tmp_path / "x"), "--decoder", str(parts["decoder"])], "name either --start"),
        ([*words[:5], "--out", str(tmp_path / "x"), "--decoder", str(parts["decoder"]), "--vision", str(parts["decoder"])], "not a CLIP"),
        (["generate", str(tmp_path / "run"), "--prompt", "x"], "llava"),
    ):
        assert main(wrong) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing is asked"):
        ask_images(tmp_path / "run", [])
    assert load_vision_language(tmp_path / "run")[0].config.vision_layer == -2
