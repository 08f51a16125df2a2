"""KTO and its kin: labelled answers, pairs taken apart, the reference point of a step, and what is said of one-sided labels."""

import json
import math

import pytest
import torch

from cut_short import killed_at
from plinth.config import UserError
from plinth.models.hub import load_model, save_model
from plinth.posttraining.examples import Unpaired
from plinth.posttraining.formats import read_examples
from plinth.posttraining.preference import train_dpo
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.preference_rows import LabelledRows
from plinth.posttraining.unpaired import mismatches, reference_point, render_labelled, weight_advice
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from small_models import SUBJECTS, plain_decoder, subjects_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return subjects_tokenizer()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(plain_decoder(tokenizer.vocab_size), tokenizer, folder)
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def labelled(name, answer, label):
    return {"prompt": f"What does {name} do?", "completion": f"It does {answer}.", "label": label}


def both_kinds():
    return [labelled(name, name, True) for name in SUBJECTS] + [labelled(a, b, False) for a, b in zip(SUBJECTS, SUBJECTS[1:])]


def quick(steps, **more):
    optimizer = OptimizerConfig(lr=0.01, muon_lr=0.02)
    return TrainConfig(steps=steps, warmup_steps=2, dtype="float32", num_threads=2, optimizer=optimizer, **more)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired", "bco"])
def test_labels_are_learnt(tmp_path, model_dir, loss):
    file = write_lines(tmp_path / "labels.jsonl", both_kinds())
    config = DpoConfig(train=quick(12), loss=loss, pairs_per_step=16, micro_batch_size=4)
    run = train_dpo(tmp_path / "out", model_dir, file, config)
    first, *_, last = run.metrics()
    assert run.summary["answers"] == 15 and run.summary["wanted"] == 8
    assert last["loss_nats"] < first["loss_nats"] and last["accuracy"] > 0.9 and last["margin"] > first["margin"]
    assert first["wanted"] == pytest.approx(8 / 15) and ("kl" in last) == (loss == "kto")
    if loss == "kto":  # nothing has moved yet: the KL is 0 and every answer stands at the point
        assert first["kl"] == pytest.approx(0, abs=1e-5) and first["loss_nats"] == pytest.approx(0.5, abs=1e-5) and last["kl"] >= 0


def test_pairs_are_taken_apart_for_a_loss_of_single_answers_and_not_the_other_way(tmp_path, model_dir):
    records = [
        {"prompt": f"What does {a} do?", "chosen": f"It does {a}.", "rejected": f"It does {b}."} for a, b in zip(SUBJECTS, SUBJECTS[1:])
    ]
    file, told = write_lines(tmp_path / "pairs.jsonl", records), []
    config = DpoConfig(train=quick(1), loss="kto", pairs_per_step=8, micro_batch_size=4)
    run = train_dpo(tmp_path / "out", model_dir, file, config, warn=told.append)
    assert run.summary["answers"] == 14 and run.summary["wanted"] == 7
    assert "read as unpaired: preference (7 rows); 14 rows used" in told[0]
    alone = write_lines(tmp_path / "labels.jsonl", both_kinds())
    with pytest.raises(UserError, match="holds labelled single answers, which loss=sigmoid does not learn from. Use --loss kto"):
        train_dpo(tmp_path / "no", model_dir, alone, DpoConfig())
    with pytest.raises(UserError, match="desirable_weight=2.0 is not read by the loss bco"):
        DpoConfig(loss="bco", desirable_weight=2.0)
    with pytest.raises(UserError, match="chosen_nll_coef=0.2 is for losses of pairs, and kto is none"):
        DpoConfig(loss="kto", chosen_nll_coef=0.2)


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_the_reference_point_does_not_depend_on_how_a_step_is_split(tmp_path, tokenizer, model_dir, loss):
    """The class of complaint of trl#2175: in TRL the KL is a micro-batch's, so that accumulating gradients changes the loss."""
    found = read_examples(write_lines(tmp_path / "labels.jsonl", both_kinds()), "unpaired")
    answers, _ = render_labelled(tokenizer, found, 64, mismatch=loss == "kto", seed=0)
    config = DpoConfig(train=quick(1, device="cpu"), loss=loss)
    rows, model = LabelledRows(answers, config, pad_id=1), load_model(model_dir)
    generator = torch.Generator().manual_seed(1)
    reference = (-30 + torch.randn(15, rows.sides, generator=generator)).numpy()
    totals, gradients = [], []
    for split in ([range(15)], [range(4), range(4, 5), range(5, 15)]):
        batches = rows.batches([torch.tensor(part).numpy() for part in split], reference, model)
        total = sum(rows.loss(model, batch)[0] for batch in batches)
        totals.append(total.item())
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
        assert len({round(float(batch[-1][0]), 6) for batch in batches}) == 1
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_reference_points_worked_by_hand():
    policy, reference, wanted = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])], [torch.tensor([-2.0, -2.0]), torch.tensor([-3.5])], None
    wanted = [torch.tensor([True, False]), torch.tensor([True])]
    assert math.isclose(reference_point("kto", policy, reference, wanted, 0.1), 1.5 / 3, rel_tol=1e-6)
    assert reference_point("kto", reference, policy, wanted, 0.1) == 0.0
    assert math.isclose(reference_point("bco", policy, reference, wanted, 0.1), 0.1 * (0.75 + 0.0) / 2, rel_tol=1e-6)


def test_mismatched_answers_belong_to_other_prompts_and_each_is_used_alike():
    def row(prompt, answer):
        return Unpaired([{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}], True)

    rows = [row(f"p{i // 2}", f"a{i}") for i in range(10)]
    others = mismatches(rows, seed=3)
    assert all(rows[i].prompt != rows[other].prompt for i, other in enumerate(others))
    assert others == mismatches(rows, seed=3) and len(set(others)) >= 7
    with pytest.raises(UserError, match="all prompts are the same"):
        mismatches(rows[:2], seed=0)


def test_one_sided_labels_are_said():
    assert weight_advice(10, 9, "kto", {}) is None
    assert "--undesirable-weight 4.00 makes them equal" in weight_advice(40, 10, "kto", {})
    assert weight_advice(40, 10, "kto", {"undesirable_weight": 4.0}) is None and weight_advice(40, 10, "bco", {}) is None
    assert "no unwanted answer" in weight_advice(5, 0, "bco", {})


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, model_dir):
    file = write_lines(tmp_path / "labels.jsonl", both_kinds())
    train = TrainConfig(steps=5, warmup_steps=1, dtype="bfloat16", num_threads=2, checkpoint_every_s=0.0)
    config = DpoConfig(train=train, loss="kto", pairs_per_step=8, micro_batch_size=4)
    whole = train_dpo(tmp_path / "whole", model_dir, file, config)

    with killed_at(4, LabelledRows, "batches"):
        train_dpo(tmp_path / "cut", model_dir, file, config)
    resumed = train_dpo(tmp_path / "cut", model_dir, file, config, resume=True)
    pairs = zip(load_model(whole.model_dir).parameters(), load_model(resumed.model_dir).parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [m["kl"] for m in whole.metrics()] == [m["kl"] for m in resumed.metrics()]
