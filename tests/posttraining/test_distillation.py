"""Distillation: the chunked loss against the whole one, its memory, a student that learns, and resuming."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.ops.softcap import softcap
from plinth.posttraining import distillation
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.distill_config import DistillConfig, TeacherFileConfig
from plinth.posttraining.distill_losses import Head, chunked_distillation_loss, distillation_loss, later_returns
from plinth.posttraining.distillation import OwnAnswers, distill, distill_loss, head_of, own_returns
from plinth.posttraining.formats import read_examples
from plinth.posttraining.learnt_texts import read_texts, render_texts
from plinth.posttraining.lora import LoraConfig
from plinth.posttraining.teacher_file import TeacherFile, write_teacher_file
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from plinth.training.stopping import Stopped
from small_models import SUBJECTS, subjects_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from live_bytes import LiveBytes


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def tokenizer():
    return subjects_tokenizer()


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
    assert run.summary["examples"] == 8 and run.summary["rejected_rows"] == 0 and len(run.provenance["parents"]) == 3


def test_plain_texts_and_the_cross_entropy_of_their_tokens(world, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"It does {name} things."}) + "\n" for name in SUBJECTS))
    run = distill(tmp_path / "out", world / "student", world / "teacher", tmp_path / "texts.jsonl", quick(30, share=0.1))
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["cross_entropy_nats"] < 0.5 * first["cross_entropy_nats"] < 0.5 * last["teacher_cross_entropy_nats"]


@pytest.mark.parametrize("way", ["given answers", "own answers", "long term", "teacher's file"])
def test_stopped_and_resumed_equals_never_stopped(world, tmp_path, monkeypatch, way):
    names = world / "student", world / "teacher", world / "data.jsonl"
    options = {
        "own answers": {"on_policy_share": 0.5},
        "long term": {"on_policy_share": 0.5, "long_term": True, "divergence": "reverse_kl"},
    }
    config = quick(6, max_tokens=12, **options.get(way, {}))
    if way == "teacher's file":
        write_teacher_file(tmp_path / "file", *names[1:], TeacherFileConfig(top_k=8, num_threads=1))
        names = names[0], tmp_path / "file", names[2]
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


def test_a_teachers_file_teaches_what_the_teacher_does(world, tmp_path):
    """With all tokens but one in the file it is the same run; with few, near it. The teacher itself is gone by then."""
    shutil.copytree(world / "teacher", tmp_path / "gone")
    vocab = load_model(tmp_path / "gone").config.vocab_size
    for name, kept in (("most", vocab - 1), ("few", 8)):
        found = write_teacher_file(
            tmp_path / name, tmp_path / "gone", world / "data.jsonl", TeacherFileConfig(top_k=kept, num_threads=2, micro_batch_size=3)
        )
        assert found["examples"] == 8 and found["positions"] == len(TeacherFile.open(tmp_path / name, *opened(world)).arrays["rest"])
    shutil.rmtree(tmp_path / "gone")
    runs = {
        name: distill(tmp_path / f"by_{name}", world / "student", source, world / "data.jsonl", quick(30))
        for name, source in (("model", world / "teacher"), ("most", tmp_path / "most"), ("few", tmp_path / "few"))
    }
    for key in ("loss_nats", "teacher_cross_entropy_nats", "cross_entropy_nats"):
        assert runs["most"].metrics()[0][key] == pytest.approx(runs["model"].metrics()[0][key], rel=1e-5)
    most, few = runs["most"].metrics()[-1], runs["few"].metrics()[-1]
    assert most["teacher_rest"] < 1e-2 < few["teacher_rest"] < 0.9 and few["teacher_rest"] == pytest.approx(found["rest"], rel=1e-5)
    assert "teacher_rest" not in runs["model"].metrics()[-1]
    assert few["loss_nats"] < 0.2 * runs["few"].metrics()[0]["loss_nats"]
    assert len(runs["few"].provenance["parents"]) == 3


def opened(world):
    """What a teacher's file is opened with."""
    tokenizer = Tokenizer.load(world / "student")
    found = read_texts(world / "data.jsonl", tokenizer)
    return world / "data.jsonl", tokenizer, render_texts(tokenizer, found, 64)


def test_a_teachers_file_is_what_the_teacher_says_of_each_learnt_token(world, tmp_path):
    """The slow twin: one example at a time, all logits, at the file's temperature; columns stand where the targets do."""
    padded, vocab = tmp_path / "padded", opened(world)[1].vocab_size
    save(opened(world)[1], padded, seed=1, zero=False, vocab_size=vocab + 20)
    config = TeacherFileConfig(top_k=5, temperature=2.0, num_threads=2, micro_batch_size=3, vocab_size=vocab)
    write_teacher_file(tmp_path / "file", padded, world / "data.jsonl", config)
    stored, model = TeacherFile.open(tmp_path / "file", *opened(world)), load_model(padded)
    stored.check_vocabulary(vocab)
    examples = opened(world)[2]
    part = [5, 0, 3]
    _, targets = pad_rows([examples[i].tokens for i in part], [examples[i].loss_mask for i in part], 0)
    ids, log_probs, rest, target_log_probs = stored.columns(part, targets)
    assert ids.shape == (*targets.shape, 5) and not rest[targets < 0].any()
    for row, i in enumerate(part):
        tokens = torch.tensor(examples[i].tokens)
        with torch.no_grad():
            logits = model.logits(model(tokens[None, :-1]))[0, :, :vocab].float()
        for t in (targets[row] >= 0).nonzero()[:, 0].tolist():
            kept, best = (logits[t] / 2).log_softmax(-1).topk(5)
            assert torch.equal(ids[row, t].long(), best) and int(targets[row, t]) == int(tokens[t + 1])
            torch.testing.assert_close(log_probs[row, t], kept, atol=1e-5, rtol=0)
            assert float(rest[row, t].exp()) == pytest.approx(1 - float(kept.exp().sum()), abs=1e-5)
            assert float(target_log_probs[row, t]) == pytest.approx(float(logits[t].log_softmax(-1)[tokens[t + 1]]), abs=1e-5)


def test_mistakes_with_a_teachers_file_are_named(world, tmp_path):
    names = world / "teacher", world / "data.jsonl"
    write_teacher_file(tmp_path / "file", *names, TeacherFileConfig(top_k=4, num_threads=1))
    with pytest.raises(UserError, match="file exists already"):
        write_teacher_file(tmp_path / "file", *names, TeacherFileConfig())
    with pytest.raises(UserError, match="top_k=9999 must be below the 300 tokens"):
        write_teacher_file(tmp_path / "other", *names, TeacherFileConfig(top_k=9999, num_threads=1))
    with pytest.raises(UserError, match="vocab_size=280 is below the tokenizer's"):
        write_teacher_file(tmp_path / "other", *names, TeacherFileConfig(top_k=9, vocab_size=280, num_threads=1))
    (tmp_path / "less.jsonl").write_text("".join((world / "data.jsonl").read_text().splitlines(True)[:3]))
    for data, options, text in (
        (tmp_path / "less.jsonl", {}, "was written for data .*Write it anew with `plinth distill score"),
        (world / "data.jsonl", {"temperature": 2.0}, "temperature=2.0, but the teacher's file is of temperature 1.0"),
        (world / "data.jsonl", {"on_policy_share": 0.5, "max_tokens": 8}, "its file holds the data's alone"),
    ):
        with pytest.raises(UserError, match=text):
            distill(tmp_path / "out", world / "student", tmp_path / "file", data, quick(2, **options))
    with pytest.raises(UserError, match="tail=drop is for a teacher's file"):
        distill(tmp_path / "out", world / "student", *names, quick(2, tail="drop"))
    with pytest.raises(UserError, match="is over 300 tokens, and the student has 280"):
        TeacherFile.open(tmp_path / "file", *opened(world)).check_vocabulary(280)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "less.jsonl"]
    for wrong, text in (({"top_k": 0}, "top_k=0"), ({"temperature": 0.0}, "temperature=0.0"), ({"dtype": "int8"}, "dtype='int8'")):
        with pytest.raises(UserError, match=text):
            TeacherFileConfig(**wrong)


def test_the_commands(world, tmp_path, capsys):
    names = ["--data", str(world / "data.jsonl")]
    assert main(["distill", "score", str(world / "teacher"), *names, "--out", str(tmp_path / "file"), "--top-k", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["top_k"] == 4 and 0 < found["rest"] < 1
    rest = ["--out", str(tmp_path / "run"), "--train.steps", "2", "--train.num-threads", "1", "--tail", "drop", "--json"]
    assert main(["distill", str(world / "student"), "--teacher", str(tmp_path / "file"), *names, *rest]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["examples"] == 8


def test_what_follows_is_a_part_of_the_loss(world, tmp_path):
    """Its value is in the metrics; without it the first update's loss is that of one step alone, and the weights go elsewhere."""
    options = {"divergence": "reverse_kl", "on_policy_share": 0.5, "max_tokens": 12}
    names = world / "student", world / "teacher", world / "data.jsonl"
    plain, whole = (distill(tmp_path / str(flag), *names, quick(2, long_term=flag, **options)) for flag in (False, True))
    first = whole.metrics()[0]
    assert first["loss_nats"] - first["long_term_nats"] == pytest.approx(plain.metrics()[0]["loss_nats"], rel=1e-5)
    assert "long_term_nats" not in plain.metrics()[0] and first["long_term_nats"] < 0  # the teacher finds those answers unlikely
    assert not torch.equal(load_model(plain.model_dir).embed.weight, load_model(whole.model_dir).embed.weight)


def test_returns_are_of_own_answers_alone(world):
    """Rows of the data have none; those that the student wrote have what `later_returns` gives from whole logits."""
    student, teacher = (load_model(world / name) for name in ("student", "teacher"))
    tokens = torch.randint(5, 280, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.arange(9) > 3, tokens.roll(-1, 1), -1)
    with torch.no_grad():
        heads = [head_of(model, tokens) for model in (student, teacher)]
        logs = [
            model.logits(model(tokens)).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0] for model in (student, teacher)
        ]
    found = own_returns(*heads, targets, torch.tensor([False, True]), True).view(2, 9)
    expected = later_returns(*logs, targets >= 0)
    assert not found[0].any() and found[1, :8].any()
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


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
        ({"long_term": True}, "long_term is a gradient of the reverse KL on the student's own answers; here divergence=forward_kl"),
        (
            {"long_term": True, "divergence": "reverse_kl", "on_policy_share": 1.0, "sampling_temperature": 0.5},
            "long_term needs temperature=1 and sampling_temperature=1",
        ),
        ({"length_normalised": False}, "length_normalised=False is for long_term"),
        ({"tail": "drop", "divergence": "jsd"}, "tail=drop leaves a sum that is no jsd"),
    ):
        with pytest.raises(UserError, match=text):
            DistillConfig(**options)
