"""What DPO does to the chosen answers: seen in the metrics, said at the end with what to do, and what is said helps."""

import json

import pytest
import torch

from cut_short import killed_at
from plinth.models.hub import load_decoder, save_model
from plinth.posttraining.displacement import displacement, last_means, length_bias
from plinth.posttraining.lora import LoraConfig
from plinth.posttraining.preference import train_dpo
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from small_models import SUBJECTS, plain_decoder, subjects_tokenizer


def quick(steps, lr=0.01, **more):
    optimizer = OptimizerConfig(lr=lr, muon_lr=0.02)
    return TrainConfig(**{"steps": steps, "warmup_steps": 2, "dtype": "float32", "num_threads": 2, "optimizer": optimizer} | more)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that gives both answers of each pair, which differ in one word, and the pairs."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = subjects_tokenizer()
    save_model(plain_decoder(tokenizer.vocab_size), tokenizer, folder / "model")
    pairs = [(f"What does {a} do?", f"It does {a} things.", f"It does {b} things.") for a, b in zip(SUBJECTS, SUBJECTS[1:])]
    rows = [{"prompt": prompt, "completion": answer} for prompt, *answers in pairs for answer in answers]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_sft(
        folder / "sft", folder / "model", folder / "sft.jsonl", SftConfig(train=quick(40), conversations_per_step=14, micro_batch_size=7)
    )
    return folder


def tuned(base, out, **changes):
    told = []
    fields = {"train": quick(30), "pairs_per_step": 7, "micro_batch_size": 4, "loss": "sigmoid", "chosen_nll_coef": 0.0} | changes
    return train_dpo(out, base / "sft", base / "pairs.jsonl", DpoConfig(**fields), warn=told.append), told


def test_a_falling_chosen_answer_is_seen_and_said_and_what_is_advised_helps(tmp_path, base):
    """The class of complaint of direct-preference-optimization#35 and trl#2382: is it normal that the chosen reward drops?"""
    plain, told = tuned(base, tmp_path / "plain", train=quick(30, lr=0.03))
    first, last = plain.metrics()[0], plain.metrics()[-1]
    assert abs(first["chosen_ratio"]) < 1e-3 and last["accuracy"] == 1.0
    assert last["chosen_ratio"] < 0 and last["rejected_ratio"] < last["chosen_ratio"] and last["chosen_fell"] > 0.5
    assert len(told) == 1 and "of the chosen answers have become less likely" in told[0] and "--chosen-nll-coef (it was 0)" in told[0]
    assert plain.summary["chosen_fell"] > 0.5 and plain.summary["chosen_ratio"] < 0
    held, told = tuned(base, tmp_path / "held", train=quick(30, lr=0.03), chosen_nll_coef=1.0)
    assert held.summary["chosen_ratio"] > 0 and held.summary["accuracy"] == 1.0 and not told


def test_displacement_needs_most_answers_and_a_falling_mean():
    assert displacement({"chosen_fell": 0.4, "chosen_ratio": -1.0, "rejected_ratio": -2.0}, 0.0) is None
    assert displacement({"chosen_fell": 0.9, "chosen_ratio": 0.1, "rejected_ratio": -2.0}, 0.0) is None
    assert displacement({"chosen_fell": 0.9, "chosen_ratio": -0.01, "rejected_ratio": -0.02}, 0.0) is None
    assert "by 1.5 nats on average (the rejected ones by 2.0)" in displacement(
        {"chosen_fell": 0.9, "chosen_ratio": -1.5, "rejected_ratio": -2.0}, 0.2
    )
    assert displacement({"accuracy": 1.0}, 0.0) is None  # a loss without a reference
    assert last_means([{"accuracy": 0.0}] * 18 + [{"accuracy": 1.0}, {"accuracy": 0.5}]) == {"accuracy": 0.75}


def test_pairs_that_length_tells_apart_are_said():
    """The class of complaint of trl#2003 and of direct-preference-optimization#36: answers that only grow."""
    assert "the longer answer is the chosen one in 75% of the pairs" in length_bias([9] * 15 + [2] * 5, [5] * 20)
    assert "the shorter answer" in length_bias([3] * 20, [5] * 20)
    assert length_bias([9, 2] * 10, [5] * 20) is None and length_bias([9] * 10, [5] * 10) is None


@pytest.mark.parametrize("adapter", [LoraConfig(4), LoraConfig(2, dora=True)])
def test_adapters_learn_pairs_against_the_model_without_them(tmp_path, base, adapter):
    run, _ = tuned(base, tmp_path / "run", adapter=adapter, train=quick(30, lr=0.005), micro_batch_size=7)
    first, last = run.metrics()[0], run.metrics()[-1]
    assert abs(first["margin"]) < 1e-4 and last["margin"] > 0.2 and last["accuracy"] == 1.0
    before, after = load_decoder(base / "sft" / "model"), load_decoder(run.model_dir)
    assert torch.equal(before.embed.weight, after.embed.weight) and (run.path / "adapter" / "adapter_config.json").exists()
    assert 0 < run.summary["trained_params"] < sum(p.numel() for p in after.parameters())


def test_a_resumed_run_with_adapters_equals_an_uninterrupted_one(tmp_path, base):
    config = {"adapter": LoraConfig(2), "train": quick(5, dtype="bfloat16", checkpoint_every_s=0.0)}
    whole, _ = tuned(base, tmp_path / "whole", **config)
    from plinth.posttraining import preference_rows

    with killed_at(5, preference_rows, "share_sides"):
        tuned(base, tmp_path / "cut", **config)
    fields = {"pairs_per_step": 7, "micro_batch_size": 4, "chosen_nll_coef": 0.0} | config
    resumed = train_dpo(tmp_path / "cut", base / "sft", base / "pairs.jsonl", DpoConfig(**fields), resume=True)
    models = (load_decoder(run.model_dir) for run in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))
