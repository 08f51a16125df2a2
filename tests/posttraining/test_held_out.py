"""Held-out rows: measured as training goes on, by the loss of the model as it is then, and without any effect on what is learnt."""

import json

import numpy as np
import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.data.buckets import like_lengths
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.formats import read_examples
from plinth.posttraining.pairs import render_pairs, share_sides
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.preference_objective import pairs_log_probs, pairs_loss
from plinth.posttraining.sft import render_examples
from plinth.posttraining.sft_config import SftConfig
from plinth.run import Run
from plinth.tokenizer.train import train_tokenizer
from plinth.training.objectives import causal_lm_loss

WORDS = ("copy", "move", "read", "write", "open", "close", "seek", "flush")
TRAIN = ["--train.steps", "5", "--train.dtype", "float32", "--train.num-threads", "1", "--micro-batch-size", "2", "--held-out-every", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a training and a held-out file of conversations, of pairs, and of labelled answers."""
    folder = tmp_path_factory.mktemp("held_out")
    tokenizer = train_tokenizer([f"What does {word} do? It does {word} things well." for word in WORDS] * 3, 300)
    shape = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48,
        max_seq_len=64,
    )  # fmt: skip
    save_model(Transformer(shape).init_weights(torch.Generator().manual_seed(0)), tokenizer, folder / "model")
    sides = [(f"What does {word} do?", f"It does {word}" + " things" * (i % 3), "It is well.") for i, word in enumerate(WORDS)]
    kinds = {
        "sft": [{"prompt": p, "completion": c} for p, c, _ in sides],
        "pairs": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sides],
        "labels": [{"prompt": p, "completion": text, "label": text == c} for p, c, r in sides for text in (c, r)],
    }
    for name, rows in kinds.items():
        for part, chosen in (("train", rows[: len(rows) // 2]), ("held", rows[len(rows) // 2 :])):
            (folder / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder, tokenizer


def test_sft_measures_the_plain_loss_and_learns_what_it_would_without(folder, tmp_path):
    folder, tokenizer = folder
    words = ["sft", str(folder / "model"), "--messages", str(folder / "sft_train.jsonl"), "--loss", "dft", *TRAIN]
    words += ["--conversations-per-step", "4"]
    held = folder / "sft_held.jsonl"
    assert main([*words, "--out", str(tmp_path / "with"), "--held-out", str(held)]) == main([*words, "--out", str(tmp_path / "out")]) == 0
    run, plain = Run.open(tmp_path / "with"), Run.open(tmp_path / "out")
    found = {line["step"]: line["held_out_loss_nats"] for line in run.metrics() if "held_out_loss_nats" in line}
    assert list(found) == [2, 4, 5] and found[5] < found[2] and run.summary["held_out_loss_nats"] == found[5]
    models = [load_model(each.model_dir) for each in (run, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))
    rows, _ = render_examples(tokenizer, read_examples(held, "messages").rows, 64)
    total, count, _ = causal_lm_loss(models[0], pad_rows([row.tokens for row in rows], [row.loss_mask for row in rows], 0))
    assert found[5] == pytest.approx(float(total.detach()) / count, rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_threads_measure_what_one_measures(folder, tmp_path, loss):
    """Each batch is one thread's, and sums are taken in the batches' order: equal to the bit before anything is learnt."""
    folder, _ = folder
    kind = "labels" if loss == "kto" else "pairs"
    words = ["prefer", str(folder / "model"), "--data", str(folder / f"{kind}_train.jsonl"), "--loss", loss, *TRAIN]
    words += ["--held-out", str(folder / f"{kind}_held.jsonl"), "--train.optimizer.lr", "1e-30", "--train.optimizer.muon-lr", "1e-30"]
    found = []
    for threads in ("1", "3"):
        assert main([*words, "--train.num-threads", threads, "--micro-batch-size", "1", "--out", str(tmp_path / threads)]) == 0
        lines = Run.open(tmp_path / threads).metrics()
        found.append([{name: value for name, value in line.items() if name.startswith("held_out_")} for line in lines])
    assert found[0] == found[1] and found[0][-1]["held_out_loss_nats"] > 0


def test_prefer_measures_held_out_pairs_against_the_same_reference(folder, tmp_path):
    folder, tokenizer = folder
    words = ["prefer", str(folder / "model"), "--data", str(folder / "pairs_train.jsonl"), "--pairs-per-step", "4", *TRAIN]
    held = folder / "pairs_held.jsonl"
    assert main([*words, "--out", str(tmp_path / "with"), "--held-out", str(held)]) == 0
    run = Run.open(tmp_path / "with")
    lines = [line for line in run.metrics() if "held_out_loss_nats" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    pairs, _ = render_pairs(tokenizer, read_examples(held, "preference"), 64)
    batch = share_sides([(pair.chosen, pair.rejected) for pair in pairs], 0)
    with torch.no_grad():
        reference = pairs_log_probs(load_model(folder / "model"), batch)
        total, count, metrics = pairs_loss(load_model(run.model_dir), (*batch, reference), DpoConfig())
    assert lines[-1]["held_out_loss_nats"] == pytest.approx(float(total) / count, rel=1e-4)
    for name in ("accuracy", "margin", "chosen_ratio", "chosen_tokens"):
        assert lines[-1][f"held_out_{name}"] == pytest.approx(metrics[name] / count, rel=1e-3, abs=1e-5)
        assert run.summary[f"held_out_{name}"] == lines[-1][f"held_out_{name}"]


def test_kto_measures_held_out_answers_too(folder, tmp_path):
    folder, _ = folder
    words = [
        "prefer",
        str(folder / "model"),
        "--data",
        str(folder / "labels_train.jsonl"),
        "--loss",
        "kto",
        "--pairs-per-step",
        "8",
        *TRAIN,
    ]
    assert main([*words, "--out", str(tmp_path / "kto"), "--held-out", str(folder / "labels_held.jsonl")]) == 0
    summary = Run.open(tmp_path / "kto").summary
    assert 0 < summary["held_out_loss_nats"] < 1 and summary["held_out_wanted"] == 0.5


def test_every_row_is_in_one_part_of_at_most_a_micro_batch():
    parts = like_lengths([5, 1, 4, 2, 3, 9, 8], 3)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(7)) and max(map(len, parts)) <= 3


def test_wrong_numbers_are_said():
    for config in (SftConfig, DpoConfig):
        with pytest.raises(UserError, match="held_out_every=0 must be at least 1"):
            config(held_out_every=0)
