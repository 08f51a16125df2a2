"""TR-DPO: a reference that follows the policy, and what is read of it between two moves."""

import json
import math

import numpy as np
import pytest
import torch

from cut_short import killed_at
from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.hub import load_model, save_model
from plinth.posttraining import moving_reference
from plinth.posttraining.formats import read_examples
from plinth.posttraining.lora_config import LoraConfig
from plinth.posttraining.moving_reference import MovingReference
from plinth.posttraining.pairs import render_pairs
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.preference_rows import PairedRows
from plinth.run import Run
from plinth.training.config import TrainConfig
from small_models import SUBJECTS, plain_decoder, subjects_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, eight pairs, and eight labelled answers."""
    folder, tokenizer = tmp_path_factory.mktemp("moving"), subjects_tokenizer()
    save_model(plain_decoder(tokenizer.vocab_size), tokenizer, folder / "model")
    sides = [(f"What does {name} do?", f"It does {name}" + " things" * (i % 3), "It is well.") for i, name in enumerate(SUBJECTS)]
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sides]
    labels = [{"prompt": p, "completion": text, "label": text == c} for p, c, r in sides[:4] for text in (c, r)]
    for name, rows in (("pairs", pairs), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def moving(folder, share, dtype=torch.float64):
    """A policy, its reference that moves every second update, and eight rows, two an update; the last two are held out."""
    tokenizer, policy = subjects_tokenizer(), load_model(folder / "model").to(dtype)
    pairs, _ = render_pairs(tokenizer, read_examples(folder / "pairs.jsonl", "preference"), 64)
    config = DpoConfig(move_reference_every=2, move_reference_by=share, train=TrainConfig(steps=5, num_threads=2))
    rows, values = PairedRows(pairs, config, 0), np.full((8, 2), np.nan, dtype=np.float32)
    reference = MovingReference(policy, lambda: load_model(folder / "model"), rows, values)
    reference.begin(config, lambda step: np.array([2 * step % 6, 2 * step % 6 + 1]), np.array([6, 7]))
    return policy, reference, rows, values


def wander(policy, seed):
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype))


@pytest.mark.parametrize("share", [None, 0.3])
def test_the_reference_moves_as_the_equation_says(folder, share):
    """π_ref ← α π + (1 − α) π_ref in float64, and what is read of it is of the rows up to the next move, and of the held-out ones."""
    policy, reference, rows, values = moving(folder, share)
    alpha, expected = share or 1.0, {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    other = load_model(folder / "model").double()
    for step in range(5):
        if step and step % 2 == 0:
            expected = {name: alpha * weight.detach() + (1 - alpha) * expected[name] for name, weight in policy.named_parameters()}
        values[:] = values if step % 2 else np.nan
        reference.at(step)
        reference.at(step)  # a step that is looked at twice moves nothing
        other.load_state_dict(expected, strict=False)
        read = [2 * each % 6 + side for each in range(step - step % 2, min(step - step % 2 + 2, 5)) for side in (0, 1)] + [6, 7]
        assert np.flatnonzero(~np.isnan(values[:, 0])).tolist() == sorted(set(read))
        with torch.no_grad():
            found = rows.score(other, rows.reference_batch(np.array(read))).numpy()
        np.testing.assert_allclose(values[read], found, rtol=2e-6)
        wander(policy, step)
    if share is not None:
        for name, weight in reference.state_dict().items():
            if name.startswith("weights/"):
                torch.testing.assert_close(weight, expected[name.removeprefix("weights/")], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="step 7 is within stretch 3"):
        reference.at(7)
    reference.close()


@pytest.mark.parametrize("share", ["1", "0.4"])
@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_resumed_run_goes_on_bit_for_bit(folder, tmp_path, loss, share):
    """Cut off between two moves, whose weights are gone by then."""
    file = folder / f"{'labels' if loss == 'kto' else 'pairs'}.jsonl"
    words = f"prefer {folder} --data {file} --held-out {file} --held-out-every 2 --loss {loss} --pairs-per-step 4 --micro-batch-size 2"
    words += f" --train.steps 8 --train.num-threads 2 --train.checkpoint-every-s 0 --train.no-background-saves --move-reference-by {share}"
    words += " --move-reference-every 3"
    if loss == "sigmoid":
        words += " --down-sample"
    assert main([*words.split(), "--out", str(tmp_path / "whole")]) == 0
    with killed_at(6, MovingReference, "at"):
        main([*words.split(), "--out", str(tmp_path / "cut")])
    with killed_at(1, moving_reference, "score_examples"):  # the moved reference is not computed again before the next move
        main([*words.split(), "--out", str(tmp_path / "cut"), "--resume"])
    assert len(Run.open(tmp_path / "cut").metrics()) == 6
    assert main([*words.split(), "--out", str(tmp_path / "cut"), "--resume"]) == 0
    found = [
        [{name: value for name, value in line.items() if not name.endswith("_s")} for line in Run.open(tmp_path / run).metrics()]
        for run in ("whole", "cut")
    ]
    names = ("step", "loss_nats", "margin", "grad_norm", "reference_moves", "held_out_loss_nats")
    once, again = ([[line.get(name) for name in names] for line in lines] for lines in found)
    assert len(once) == 8 and once == again and [line["reference_moves"] for line in found[0]] == [0, 0, 0, 1, 1, 1, 2, 2]
    models = [load_model(tmp_path / run / "model") for run in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


@pytest.mark.parametrize("more", [[], ["--adapter.rank", "4"]])
def test_right_after_a_move_to_the_policy_the_loss_is_that_of_no_difference(folder, tmp_path, more):
    words = f"prefer {folder} --data {folder / 'pairs.jsonl'} --pairs-per-step 4 --train.steps 6 --train.num-threads 1 --chosen-nll-coef 0"
    words += f" --out {tmp_path / 'run'} --move-reference-every 2 --train.optimizer.name adamw --train.optimizer.lr 0.01"
    assert main([*words.split(), *more]) == 0
    losses = [line["loss_nats"] for line in Run.open(tmp_path / "run").metrics()]
    assert losses[0::2] == pytest.approx([math.log(2)] * 3, abs=1e-6) and all(abs(loss - math.log(2)) > 1e-4 for loss in losses[1::2])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"move_reference_by": 0.5}, "move_reference_by=0.5 says how far, and nothing how often"),
        ({"move_reference_every": 5, "loss": "simpo"}, "simpo reads none"),
        ({"move_reference_every": 5, "move_reference_by": 0.0}, "must lie above 0"),
        ({"move_reference_every": 5, "move_reference_by": 0.5, "adapter": LoraConfig(4)}, "a mix of two adapters' matrices"),
        ({"move_reference_every": 0}, "move_reference_every=0 must be at least 1"),
    ],
)
def test_a_reference_that_cannot_move_so_is_a_mistake(options, text):
    with pytest.raises(UserError, match=text):
        DpoConfig(**options)
