"""Finetuning of encoders: each task is learnt from examples and told right on new ones; resumed equals never stopped."""

import json

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.electra import Electra
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.hub import load_model, save_model
from plinth.posttraining import finetuning
from plinth.posttraining.finetuning import FinetuneConfig, finetune
from plinth.tokenizer.encoder_tokens import encoder_tokens, with_encoder_tokens
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

PEOPLE, PLACES = ("Ada", "Bob", "Eve", "Max"), ("Rome", "Oslo", "Kyiv", "Lima")


def examples(task, count, first=0):
    """Sentences of who went where; the label is the place, the tags mark both, the question asks for one of them."""
    found = []
    for i in range(first, first + count):
        person, place, other = PEOPLE[i % 4], PLACES[i // 4 % 4], PLACES[(i + 1) % 4]
        words = [person, "went", "to", place, "by", ("train", "bus", "ship")[i % 3]]
        text = " ".join(words)
        if task == "classify":
            found.append({"text": text, "label": place})
        elif task == "tag":
            found.append({"words": words, "tags": ["B-WHO", "O", "O", "B-WHERE", "O", "O"]})
        else:
            asked = ("Where?", place, text.index(place)) if i % 3 else ("Who?", person, 0)
            answers = [] if i % 5 == 0 else [{"text": asked[1], "start": asked[2]}]
            found.append({"question": asked[0] if answers else f"Near {other}?", "context": text, "answers": answers})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fresh BERT and a fresh ELECTRA, and examples of each task to learn and to test on."""
    root = tmp_path_factory.mktemp("finetuning")
    texts = [" ".join(str(value) for value in example.values()) for example in examples("answer", 48)]
    tokenizer = with_encoder_tokens(train_tokenizer([text for text in texts for _ in range(3)], 340))
    shape = EncoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_seq_len=32,
        pad_id=encoder_tokens(tokenizer).pad,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    save_model(EncoderModel(shape).init_weights(generator), tokenizer, root / "bert")
    save_model(Electra(shape, 0.5).init_weights(generator).discriminator, tokenizer, root / "electra")
    for task in ("classify", "tag", "answer"):
        for part, count, first in (("train", 64, 0), ("test", 16, 100)):
            lines = (json.dumps(example) + "\n" for example in examples(task, count, first))
            (root / f"{task}_{part}.jsonl").write_text("".join(lines))
    return root


@pytest.mark.parametrize(
    "family, task, epochs", [("bert", "classify", 30), ("electra", "classify", 30), ("bert", "tag", 8), ("bert", "answer", 40)]
)
def test_each_task_is_learnt_through_the_commands(folder, tmp_path, capsys, family, task, epochs):
    learn = ["finetune", folder / family, folder / f"{task}_train.jsonl", "--task", task, "--out", tmp_path / "run", "--epochs", epochs]
    learn += ["--train.optimizer.lr", "0.01", "--examples-per-step", "32", "--micro-batch-size", "32", "--train.dtype", "float32"]
    assert main([str(word) for word in learn]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(folder / f"{task}_test.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    value = {"classify": "accuracy", "tag": "entity_f1", "answer": "f1"}[task]
    assert result["scores"][value]["value"] >= 0.9, result["scores"]
    asked = ["--question", "Where?"] if task == "answer" else []
    assert main(["predict", str(tmp_path / "run"), "--text", "Eve went to Oslo by bus", *asked]) == 0
    assert {"classify": "Oslo 0.", "tag": "Eve/B-WHO went to Oslo/B-WHERE by bus", "answer": "Oslo"}[task] in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == family and config["architectures"][0].startswith(family.capitalize() + "For")


def quick(task="classify", steps=4, **options):
    train = TrainConfig(
        steps=steps, warmup_steps=1, dtype="float32", num_threads=2, checkpoint_every_s=0.0, optimizer=OptimizerConfig(name="adamw")
    )
    return FinetuneConfig(task, train, examples_per_step=8, micro_batch_size=4, **options)


class Killed(BaseException):
    """Stands for a power cut."""


def test_stopped_and_resumed_equals_never_stopped(folder, tmp_path, monkeypatch):
    data = folder / "tag_train.jsonl"
    whole = load_model(finetune(tmp_path / "whole", folder / "bert", data, quick("tag")).model_dir).state_dict()
    calls, batch_of = [], finetuning.batch_of

    def until(rows, config, shape):
        calls.append(1)
        if len(calls) > 5:
            raise Killed
        return batch_of(rows, config, shape)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(finetuning, "batch_of", until)
        finetune(tmp_path / "cut", folder / "bert", data, quick("tag"))
    resumed = load_model(finetune(tmp_path / "cut", folder / "bert", data, quick("tag"), resume=True).model_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_encoder_is_kept_and_the_head_is_new_unless_it_is_the_same(folder, tmp_path):
    base = load_model(folder / "bert")
    labels, generator = ("a", "b"), torch.Generator().manual_seed(1)
    model = finetuning.with_new_head(base, quick(), labels, generator, "x")
    assert torch.equal(model.encoder.layers[0].up.weight, base.encoder.layers[0].up.weight)
    with torch.no_grad():
        model.head.out.weight.fill_(0.5)
    again = finetuning.with_new_head(model, quick(), labels, generator, "x")
    assert (again.head.out.weight == 0.5).all()
    other = finetuning.with_new_head(model, quick(), ("a", "b", "c"), generator, "x")
    assert (other.head.out.weight == 0).all()
    fresh = finetuning.with_new_head(base, quick(fresh=True), labels, generator, "x")
    assert not torch.equal(fresh.encoder.layers[0].up.weight, base.encoder.layers[0].up.weight)


def test_mistakes_are_told_before_there_is_a_run(folder, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n')
    with pytest.raises(UserError, match="the label x alone"):
        finetune(tmp_path / "run", folder / "bert", one, quick())
    with pytest.raises(UserError, match="max_seq_len=99 must lie between 4 and the model's 32"):
        finetune(tmp_path / "run", folder / "bert", folder / "classify_train.jsonl", quick(max_seq_len=99))
    with pytest.raises(UserError, match="no 'tags'"):
        finetune(tmp_path / "run", folder / "bert", folder / "classify_train.jsonl", quick("tag"))
    assert not (tmp_path / "run").exists()
