"""Distillation: the chunked loss against the whole one, its memory, a student that learns, and resuming."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.ops.softcap import softcap
from plinth.posttraining import distillation
from plinth.posttraining.distill_losses import Head, chunked_distillation_loss, distillation_loss
from plinth.posttraining.distillation import DistillConfig, OwnAnswers, distill, distill_loss
from plinth.posttraining.formats import read_examples
from plinth.posttraining.lora import LoraConfig
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from plinth.training.stopping import Stopped

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from live_bytes import LiveBytes

SUBJECTS = ["copy", "move", "read", "write", "open", "close", "seek", "flush"]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"What does {name} do? It does {name} things." for name in SUBJECTS] * 3, 300)


def save(tokenizer, folder, *, seed=0, zero=True, **shape):
    config = DecoderConfig(
        **{"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
           "intermediate_size": 64, "max_seq_len": 64, **shape}
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).init_weights(generator)
    if not zero:  # a teacher that says something of the tokens before
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("distillation")
    save(tokenizer, folder / "student")
    save(tokenizer, folder / "teacher", seed=1, zero=False, num_layers=1, hidden_size=48)
    rows = [
        {"messages": [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": f"It does {name} things."}]}
        for name in SUBJECTS
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def quick(steps, dtype="float32", **more):
    optimizer = OptimizerConfig(lr=0.01, muon_lr=0.02)
    train = TrainConfig(steps=steps, warmup_steps=2, dtype=dtype, num_threads=2, optimizer=optimizer, checkpoint_every_s=0)
    return DistillConfig(train=train, examples_per_step=8, micro_batch_size=4, **more)


def test_two_vocabularies_of_logits_never_stand_in_memory():
    rows, vocab, width = 256, 2048, 8
    weight = random(vocab, width, seed=1, dtype=torch.float32).requires_grad_()
    hidden = random(rows, width, seed=2, dtype=torch.float32).requires_grad_()
    teacher = Head(random(rows, 4, seed=3, dtype=torch.float32), random(vocab, 4, seed=4, dtype=torch.float32))
    targets = torch.arange(rows)
    peaks = {}
    for chunk in (8, rows):
        with LiveBytes() as memory:
            loss = chunked_distillation_loss(Head(hidden, weight), teacher, targets, rows=chunk, name="jsd")[0]
            torch.autograd.grad(loss, [hidden, weight])
        peaks[chunk] = memory.peak
    logits = rows * vocab * 4
    assert peaks[8] < logits / 2 < 4 * logits < peaks[rows]


def test_uncounted_positions_do_not_reach_the_heads():
    vocab, width = 64, 8
    targets = torch.full((400,), -1)
    targets[7] = 3
    teacher = Head(random(400, 4, seed=3), random(vocab, 4, seed=4))
    with LiveBytes() as memory:
        chunked_distillation_loss(Head(random(400, width), random(vocab, width)), teacher, targets)
    assert memory.peak < 400 * vocab * 8 / 2


@pytest.mark.parametrize("weight_learns", [True, False])
def test_caps_and_padded_vocabularies(weight_learns):
    targets = torch.tensor([3, -1, 0, 6, 2])
    hidden, weight = random(5, 4, seed=1), random(9, 4, seed=2)
    teacher_hidden, other = random(5, 6, seed=3), random(7, 6, seed=4)
    results = []
    for whole in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(weight_learns)
        if whole:
            logits, teacher = softcap(h @ w[:7].T, 2.0), softcap(teacher_hidden @ other.T, 3.0)
            loss, _ = distillation_loss(logits.double(), teacher.double(), targets, name="reverse_kl", temperature=2.0)
        else:
            heads = Head(h, w, 2.0), Head(teacher_hidden, other, 3.0)
            loss, count, measures = chunked_distillation_loss(*heads, targets, rows=2, name="reverse_kl", temperature=2.0)
            assert count == 4
        loss.backward()
        results.append([loss.detach(), h.grad] + ([w.grad] if weight_learns else []))
    for expected, found in zip(*results):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)
    hard = F.cross_entropy(softcap(hidden @ weight[:7].T, 2.0), targets, ignore_index=-1, reduction="sum")
    assert float(measures["cross_entropy_nats"]) == pytest.approx(float(hard), rel=1e-5)


def test_no_split_of_a_batch_changes_loss_or_gradient(world):
    student, teacher = load_model(world / "student"), load_model(world / "teacher")
    inputs = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.5, inputs.roll(-1, 1), -1)
    results = []
    for split in (1, 2, 4):
        student.zero_grad()
        parts = [distill_loss(student, teacher, part, DistillConfig()) for part in zip(inputs.chunk(split), targets.chunk(split))]
        sum(part[0] for part in parts).backward()
        results.append([torch.stack([part[0].detach() for part in parts]).sum(), student.embed.weight.grad.clone()])
        assert sum(part[1] for part in parts) == int((targets >= 0).sum())
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name,dtype", [("forward_kl", "float32"), ("jsd", "bfloat16")])
def test_a_student_learns_its_teacher(world, tmp_path, name, dtype):
    config = quick(40, dtype, divergence=name, temperature=2.0 if name == "forward_kl" else 1.0)
    run = distill(tmp_path / "out", world / "student", world / "teacher", world / "data.jsonl", config)
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["loss_nats"] < 0.1 * first["loss_nats"]
    assert last["same_first_choice"] > 0.8 > first["same_first_choice"]
    assert last["cross_entropy_nats"] == pytest.approx(last["teacher_cross_entropy_nats"], rel=0.1)
    assert run.summary["examples"] == 8 and len(run.provenance["parents"]) == 3


def test_plain_texts_and_the_cross_entropy_of_their_tokens(world, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"It does {name} things."}) + "\n" for name in SUBJECTS))
    run = distill(tmp_path / "out", world / "student", world / "teacher", tmp_path / "texts.jsonl", quick(30, share=0.1))
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["cross_entropy_nats"] < 0.5 * first["cross_entropy_nats"] < 0.5 * last["teacher_cross_entropy_nats"]


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_stopped_and_resumed_equals_never_stopped(world, tmp_path, monkeypatch, own):
    names = world / "student", world / "teacher", world / "data.jsonl"
    config = quick(6, on_policy_share=own, max_tokens=12)
    whole = load_model(distill(tmp_path / "whole", *names, config).model_dir).state_dict()
    calls = []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 9:  # within the fifth step
            raise Stopped("stopped for the test")
        return distill_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "distill_loss", stopping)
        with pytest.raises(Stopped):
            distill(tmp_path / "cut", *names, config)
    run = distill(tmp_path / "cut", *names, config, resume=True)
    assert [line["step"] for line in run.metrics()] == list(range(1, 7))
    resumed = load_model(run.model_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_student_learns_on_answers_of_its_own(world, tmp_path):
    config = quick(30, on_policy_share=0.75, max_tokens=12)
    run = distill(tmp_path / "out", world / "student", world / "teacher", world / "data.jsonl", config)
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["loss_nats"] < 0.8 * first["loss_nats"]
    assert last["own_answers"] == 0.75 and 1 <= last["completion_tokens"] <= 12
    assert not torch.equal(*(load_model(run.model_dir).embed.weight, load_model(world / "student").embed.weight))


def test_own_answers_stand_behind_their_prompts(world, tokenizer):
    student, found = load_model(world / "student"), read_examples(world / "data.jsonl", "messages")
    own = OwnAnswers(student, tokenizer, found, quick(1, on_policy_share=0.5, max_tokens=5), 64)
    first, again, later = (own.write(range(8), step) for step in (0, 0, 1))
    assert len(first) == 4 and first == again and first != later
    for i, row in first.items():
        text = tokenizer.decode([token for token, learnt in zip(row.tokens, row.loss_mask) if not learnt])
        assert SUBJECTS[i] in text and 1 <= sum(row.loss_mask) <= 5 and not row.loss_mask[len(row.tokens) - sum(row.loss_mask) - 1]


def test_adapters_learn_in_the_place_of_the_weights(world, tmp_path):
    config = quick(30, adapter=LoraConfig(rank=4), on_policy_share=0.5, max_tokens=8)
    run = distill(tmp_path / "out", world / "student", world / "teacher", world / "data.jsonl", config)
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["loss_nats"] < first["loss_nats"] and (run.path / "adapter" / "adapter_config.json").exists()
    before, after = (load_model(folder) for folder in (world / "student", run.model_dir))
    assert torch.equal(before.embed.weight, after.embed.weight)
    assert not torch.equal(before.layers[0].mlp.down.weight, after.layers[0].mlp.down.weight)


def test_a_student_of_experts_keeps_their_load_even(world, tmp_path, tokenizer):
    save(tokenizer, tmp_path / "experts", num_experts=4, num_active_experts=2, expert_intermediate_size=32)
    run = distill(tmp_path / "out", tmp_path / "experts", world / "teacher", world / "data.jsonl", quick(2))
    assert run.metrics()[-1]["router_balance"] >= 1 and run.metrics()[-1]["text_loss_nats"] < run.metrics()[-1]["loss_nats"]


def test_mistakes_are_named(world, tmp_path, tokenizer):
    save(train_tokenizer(["something else entirely, in other words " * 5], 290), tmp_path / "other", vocab_size=300)
    with pytest.raises(UserError, match=r"tokenizer \w+ of the teacher .* differs .*plinth best-of"):
        distill(tmp_path / "out", world / "student", tmp_path / "other", world / "data.jsonl", quick(2))
    save(tokenizer, tmp_path / "short", max_seq_len=8)
    with pytest.raises(UserError, match="row 1 has .* tokens, more than max_seq_len=8"):
        distill(tmp_path / "out", world / "student", tmp_path / "short", world / "data.jsonl", quick(2))
    with pytest.raises(UserError, match="the prompt of row 1 has .* room for 4"):
        distill(tmp_path / "out", world / "student", world / "teacher", world / "data.jsonl", quick(2, on_policy_share=1.0, max_tokens=60))
    assert not (tmp_path / "out").exists()
    for options, text in (
        ({"divergence": "kl"}, "is not one of forward_kl"),
        ({"beta": 0.5}, "beta=0.5 is for divergence=jsd"),
        ({"share": 0.0}, "share=0.0 must be above 0"),
        ({"on_policy_share": 0.5, "share": 0.5}, "share=0.5 adds the cross-entropy"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ):
        with pytest.raises(UserError, match=text):
            DistillConfig(**options)
