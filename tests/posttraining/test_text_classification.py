"""Classifiers on language models: learnt and used through the commands, resumed bit for bit, frozen where they say so."""

import json
from dataclasses import replace

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.features import causal_rows
from plinth.data.labelled import TextExample
from plinth.inference.text_classifier import LoadedClassifier
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.text_classifier import PooledHeadConfig
from plinth.models.transformer import Transformer
from plinth.posttraining import text_classification
from plinth.posttraining.text_classification import TransferClassifyConfig, classifier_on, train_classifier
from plinth.tokenizer.train import train_tokenizer
from plinth.training.checkpoint import read_checkpoint
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

PEOPLE, PLACES, WAYS = ("Ada", "Bob", "Eve", "Max"), ("Rome", "Oslo", "Kyiv"), ("train", "bus", "ship")
KINDS = ("awd-lstm", "decoder")


def example(i):
    return {"text": f"{PEOPLE[i % 4]} went to {PLACES[i // 4 % 3]} by {WAYS[i % 3]}" + " again" * (i % 5), "label": PLACES[i // 4 % 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fresh language model of each kind, and examples to learn and to test on."""
    root = tmp_path_factory.mktemp("classification")
    tokenizer = train_tokenizer([example(i)["text"] for i in range(60)], 320)
    lstm = AwdLstmConfig(vocab_size=tokenizer.vocab_size, embedding_size=12, hidden_size=16, num_layers=2)
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=32, max_seq_len=24
    )
    for name, model in zip(KINDS, (AwdLstm(lstm), Transformer(decoder))):
        save_model(model.init_weights(torch.Generator().manual_seed(7)), tokenizer, root / name)
    for part, numbers in (("train", range(60)), ("test", range(1000, 1024))):
        (root / f"{part}.jsonl").write_text("".join(json.dumps(example(i)) + "\n" for i in numbers))
    return root


def quick(steps=8, **options):
    train = TrainConfig(
        steps=steps, dtype="float32", num_threads=2, checkpoint_every_s=0.0, background_saves=False,
        optimizer=OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1),
    )  # fmt: skip
    return TransferClassifyConfig(train=train, examples_per_step=20, micro_batch_size=10, unfreeze_epochs=0.5, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_learnt_and_predicted_through_the_commands(folder, tmp_path, capsys, kind):
    learn = ["transfer", "classify", folder / kind, folder / "train.jsonl", "--out", tmp_path / "run", "--epochs", "40"]
    learn += [
        "--train.optimizer.lr",
        "0.03",
        "--rates.depth-factor",
        "1.2",
        "--train.dtype",
        "float32",
        "--head.chunk-tokens",
        "6",
        "--json",
    ]
    assert main([str(word) for word in learn]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["labels"] == sorted(PLACES) and summary["groups"] == 4
    assert "accuracy" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert main(["predict", str(tmp_path / "run"), str(folder / "test.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    accuracy = result["scores"]["accuracy"]
    assert accuracy["value"] >= 0.9 and accuracy["ci95"][0] < accuracy["value"] and accuracy["n"] == 24
    assert sum(result["predictions"][0]["probabilities"].values()) == pytest.approx(1)
    assert main(["predict", str(tmp_path / "run"), "--text", "Eve went to Oslo by bus"]) == 0
    assert capsys.readouterr().out.startswith("Oslo ")


def test_a_backward_model_reads_texts_turned_round_and_its_probabilities_are_averaged(folder, tmp_path, capsys):
    for name, backwards in (("there", False), ("back", True)):
        config = quick(unfreeze="all", head=PooledHeadConfig(backwards=backwards))
        train_classifier(tmp_path / name, folder / "awd-lstm", folder / "train.jsonl", config)
    reads = [LoadedClassifier.load(tmp_path / name) for name in ("there", "back")]
    text = TextExample(example(5)["text"])
    rows = [causal_rows([text], reads[0].tokenizer, {}, None, False, backwards)[0].tokens for backwards in (False, True)]
    assert rows[0][0] == rows[1][0] == reads[0].tokenizer.end_of_text_id and rows[1][1:] == rows[0][:0:-1]
    single = [one.classify([text])[0].probabilities for one in reads]
    command = ["predict", str(tmp_path / "there"), "--ensemble", str(tmp_path / "back"), "--text", text.text, "--json"]
    assert main(command) == 0
    both = json.loads(capsys.readouterr().out)["predictions"][0]
    assert both["probabilities"] == pytest.approx({label: (single[0][label] + single[1][label]) / 2 for label in PLACES})
    assert both["label"] == max(both["probabilities"], key=both["probabilities"].get)


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_equals_never_stopped(folder, tmp_path, monkeypatch, kind):
    data, config = folder / "train.jsonl", quick()
    whole = train_classifier(tmp_path / "whole", folder / kind, data, config)
    make = text_classification.batch_of

    def until(rows, tokenizer, config, unfreezing, step, part):
        if step == 5:
            raise Killed
        return make(rows, tokenizer, config, unfreezing, step, part)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(text_classification, "batch_of", until)
        train_classifier(tmp_path / "cut", folder / kind, data, config)
    resumed = train_classifier(tmp_path / "cut", folder / kind, data, config, resume=True)
    states = [load_model(run.model_dir).state_dict() for run in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(name.endswith("norms.0.mean") for name in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_groups_do_not_move_by_a_bit_and_the_others_do(folder, tmp_path, kind):
    base = load_model(folder / kind)
    config = quick(steps=3)  # 3 steps a pass, half a pass a group: the head at step 0, the top layers from step 2
    start = dict(classifier_on(base, config, tuple(sorted(PLACES)), "x").named_parameters())
    groups = classifier_on(base, config, tuple(sorted(PLACES)), "x").depth_groups()
    with pytest.raises(UserError, match="Raise epochs, lower unfreeze-epochs, or take unfreeze=all"):
        train_classifier(tmp_path / "short", folder / kind, folder / "train.jsonl", config)
    for name, options, learns in (
        ("head", {"unfreeze": "head"}, [len(groups) - 1]),
        ("all", {"unfreeze": "all"}, range(len(groups))),
    ):
        run = train_classifier(tmp_path / name, folder / kind, folder / "train.jsonl", replace(config, **options))
        moved = {key for key, parameter in load_model(run.model_dir).named_parameters() if not torch.equal(parameter, start[key])}
        assert [i for i, group in enumerate(groups) if moved & set(group)] == list(learns)


def test_gradual_unfreezing_moves_one_group_more_at_each_stretch(folder, tmp_path):
    config = replace(quick(steps=8), unfreeze_epochs=2 / 3)  # two steps a group
    config = replace(config, train=replace(config.train, keep_every_steps=2, keep_final=True))
    run = train_classifier(tmp_path / "run", folder / "awd-lstm", folder / "train.jsonl", config)
    assert run.summary["unfrozen_at_steps"] == [0, 2, 4, 6]
    assert [line["learning_groups"] for line in run.metrics()] == [1, 1, 2, 2, 3, 3, 4, 4]
    model = classifier_on(load_model(folder / "awd-lstm"), config, tuple(sorted(PLACES)), "x")
    start, groups = {name: parameter.detach() for name, parameter in model.named_parameters()}, model.depth_groups()
    for step, frozen in ((2, 3), (4, 2), (6, 1), (8, 0)):
        saved = {name.removeprefix("weight/"): tensor for name, tensor in read_checkpoint(run.checkpoint_path(step))[1].items()}
        moved = [any(not torch.equal(saved[name], start[name]) for name in group) for group in groups]
        assert moved == [False] * frozen + [True] * (4 - frozen), step


def test_fresh_weights_are_not_the_pretrained_ones(folder):
    base, labels = load_model(folder / "awd-lstm"), ("a", "b")
    assert torch.equal(classifier_on(base, quick(), labels, "x").trunk.embed.weight, base.embed.weight)
    assert not torch.equal(classifier_on(base, quick(fresh=True), labels, "x").trunk.embed.weight, base.embed.weight)
    config = classifier_on(base, quick(trunk_dropout=0.5), labels, "x").config.trunk
    assert config.hidden_dropout == 0.5 * base.config.hidden_dropout and config.output_dropout == 0.0


def test_long_texts_have_no_limit_but_a_decoders_context(folder, tmp_path):
    long = tmp_path / "long.jsonl"
    rows = [example(i) | {"text": (example(i)["text"] + ". ") * 12} for i in range(8)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = PooledHeadConfig(chunk_tokens=16, gradient_tokens=20)
    run = train_classifier(tmp_path / "lstm", folder / "awd-lstm", long, quick(steps=1, unfreeze="all", head=head))
    assert run.summary["steps"] == 1
    with pytest.raises(UserError, match="more than 24. Shorten it, or pass --truncate"):
        train_classifier(tmp_path / "decoder", folder / "decoder", long, quick(steps=1, unfreeze="all"))
    cut = train_classifier(tmp_path / "cut", folder / "decoder", long, quick(steps=1, unfreeze="all", truncate=True))
    assert cut.is_done and (cut.summary["cut_rows"], run.summary["cut_rows"], cut.summary["rejected_rows"]) == (8, 0, 0)


def test_mistakes_are_told_before_there_is_a_run(folder, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n')
    with pytest.raises(UserError, match="the label x alone"):
        train_classifier(tmp_path / "run", folder / "awd-lstm", one, quick())
    with pytest.raises(UserError, match="unfreeze_epochs=0 must be positive"):
        TransferClassifyConfig(unfreeze_epochs=0)
    assert not (tmp_path / "run").exists()
