"""Packing and micro-batches change nothing of what is learnt: loss and gradient are those of each conversation alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cut_short import killed_at
from plinth.cli.sft import main
from plinth.config import UserError
from plinth.data.buckets import EvenMicroBatches, PackedExamples
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.posttraining import sft
from plinth.posttraining.batches import pack_rows, pad_rows
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig
from plinth.training.precision import MasterWeights
from plinth.training.step import Workers, split_gradients

SIZE = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, max_seq_len=64
)
SHAPES = {
    "ours": SIZE,
    "learned positions": replace(SIZE, position="learned", num_kv_heads=4, qk_norm=False),
    "sliding window": replace(SIZE, sliding_window=5),
    "value embeddings": replace(SIZE, value_embeddings=True),
}


def make_model(config=SIZE):
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


def make_examples(count=11, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 30, count)
    return [Rendered(rng.integers(3, 64, n).tolist(), [True, *(rng.random(n - 2) < 0.5).tolist(), True][:n]) for n in lengths]


def gradients(model, batches, num_threads=1):
    """Return the loss summed over the batches, its count, and the gradient of the mean, as the training step takes them."""
    workers = Workers(num_threads)
    try:
        loss, count, _, grads = split_gradients(MasterWeights(model, torch.float32), causal_lm_loss, batches, workers)
    finally:
        workers.close()
    return float(loss) / float(count), float(count), [grad / float(count) for grad in grads]


def padded(examples, more=0):
    inputs, targets = pad_rows([e.tokens for e in examples], [e.loss_mask for e in examples], 0)
    wider = torch.nn.functional.pad
    return wider(inputs, (0, more), value=1), wider(targets, (0, more), value=-1)


def assert_same(ours, expected):
    assert ours[1] == expected[1]
    assert abs(ours[0] - expected[0]) <= 1e-5
    assert max(float((a - b).abs().max()) for a, b in zip(ours[2], expected[2])) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_packed_loss_and_gradient_equal_the_unpacked_ones_in_any_order(shape, seed):
    """The class of complaint of trl#1230, #805, #3067, PR#5316 and torchtune#892: packed examples see each other without FlashAttention."""
    model, examples = make_model(SHAPES[shape]), make_examples()
    alone = gradients(model, [padded([example]) for example in examples])
    order = np.random.default_rng(seed).permutation(len(examples))
    packer = PackedExamples([len(examples[i].tokens) - 1 for i in order], 64, len(order), len(order), seed)
    rows = [[examples[order[i]] for i in row] for part in packer.rows(0) for row in part]
    assert max(map(len, rows)) > 2
    assert_same(gradients(model, [pack_rows(rows, 0)]), alone)
    assert_same(gradients(model, [pack_rows([row], 0) for row in reversed(rows)]), alone)


def test_what_else_lies_in_a_row_changes_no_bit_of_an_examples_hidden_states_trl_805():
    model, (first, *others) = make_model(), make_examples()
    length = len(first.tokens) - 1
    seen = []
    for other in others[:3]:
        inputs, _, segments = pack_rows([[first, Rendered((other.tokens * 9)[:35], [True] * 35)]], 0)
        seen.append(model(inputs, segments)[0, :length])
    assert all(torch.equal(seen[0], again) for again in seen[1:])


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_divides_by_all_counted_tokens_whatever_the_micro_batches_trl_2175(seed):
    """Also trl#2456, #2604, #5619, PR#6024, transformers#34191: a mean of means weighs short micro-batches too much."""
    model, examples = make_model(), make_examples(12)
    whole = gradients(model, [padded(examples)])
    rng = np.random.default_rng(seed)
    order = [examples[i] for i in rng.permutation(12)]
    cuts = [0, *sorted(rng.choice(np.arange(1, 12), 4, replace=False).tolist()), 12]
    batches = [padded(order[a:b], more=int(rng.integers(0, 20))) for a, b in zip(cuts, cuts[1:])]
    assert_same(gradients(model, batches), whole)
    assert_same(gradients(model, batches[::-1], num_threads=2), whole)


def test_a_micro_batch_without_a_counted_token_weighs_nothing_trl_5619():
    model, examples = make_model(), make_examples(4)
    nothing = [Rendered(example.tokens, [False] * len(example.tokens)) for example in examples]
    assert_same(gradients(model, [padded(nothing), padded(examples)]), gradients(model, [padded(examples)]))


def test_packed_rows_hold_every_example_once_an_epoch_and_none_is_cut():
    lengths = np.random.default_rng(0).integers(3, 200, 300).tolist()
    packer = PackedExamples(lengths, 256, 32, 16, seed=3)
    epochs = [[packer.rows(epoch * packer.steps_per_epoch + i) for i in range(packer.steps_per_epoch)] for epoch in range(2)]
    for steps in epochs:
        rows = [row for step in steps for part in step for row in part]
        assert sorted(i for row in rows for i in row) == list(range(300)) and len(rows) == packer.num_rows
        assert all(sum(lengths[i] for i in row) <= 256 for row in rows)
    assert str(epochs[0]) != str(epochs[1]) and packer.fill > 0.97
    examples_a_step = 300 / packer.steps_per_epoch
    assert 24 <= examples_a_step <= 40 and len(epochs[0][0]) == 2
    assert str(PackedExamples(lengths, 256, 32, 16, seed=3).rows(packer.steps_per_epoch)) == str(epochs[1][0])
    assert packer.steps_for(3.0, None) == 3 * packer.steps_per_epoch
    assert packer.steps_for(1.0, packer.padded_tokens()) == packer.steps_per_epoch


def test_micro_batches_without_padding_share_a_step_evenly_and_show_every_example_once():
    lengths = np.random.default_rng(0).integers(3, 200, 101).tolist()
    deal = EvenMicroBatches(lengths, 16, 4, seed=3)
    assert deal.steps_per_epoch == 7
    epochs = [[deal.rows(epoch * 7 + step) for step in range(7)] for epoch in range(2)]
    for steps in epochs:
        assert sorted(int(i) for step in steps for (row,) in step for i in row) == list(range(101))
        for step in steps[:-1]:
            tokens = [sum(lengths[i] for i in row) for (row,) in step]
            assert len(step) == 4 and max(tokens) < 1.2 * min(tokens)
    assert str(epochs[0]) != str(epochs[1])
    assert str(EvenMicroBatches(lengths, 16, 4, seed=3).rows(9)) == str(epochs[1][2])
    assert deal.steps_for(2.0, None) == 14 and deal.steps_for(1.0, 2 * sum(lengths)) == 14


def conversation(i):
    said = "It does " + "this and that " * (i % 4) + f"{i}."
    return {"messages": [{"role": "user", "content": f"What does {i} do?"}, {"role": "assistant", "content": said}]}


@pytest.fixture
def files(tmp_path):
    """A model and sixteen conversations."""
    tokenizer = train_tokenizer([f"What does {i} do? It does this and that {i}." for i in range(9)] * 3, 300)
    config = replace(SIZE, vocab_size=tokenizer.vocab_size, max_seq_len=128)
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, tmp_path / "model")
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(16)))
    return tmp_path


def quick(steps, dtype="float32", **more):
    train = TrainConfig(
        steps=steps, warmup_steps=2, dtype=dtype, num_threads=2, checkpoint_every_s=0.0, optimizer=OptimizerConfig(lr=0.01, muon_lr=0.02)
    )
    return SftConfig(train=train, conversations_per_step=8, micro_batch_size=4, **more)


@pytest.mark.parametrize("packing", [True, False])
def test_sft_without_padding_resumes_to_the_same_weights(files, packing):
    config = quick(6, "bfloat16", packing=packing, unpadded=not packing)
    whole = train_sft(files / "whole", files / "model", files / "sft.jsonl", config)
    assert whole.metrics()[-1]["loss_nats"] < whole.metrics()[0]["loss_nats"]

    with killed_at(5, sft, "pack_rows"):
        train_sft(files / "cut", files / "model", files / "sft.jsonl", config)
    resumed = train_sft(files / "cut", files / "model", files / "sft.jsonl", config, resume=True)
    models = [load_model(run.model_dir) for run in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


def test_sft_counts_the_same_tokens_and_starts_at_the_same_loss_padded_packed_or_end_to_end(files):
    """One step of all conversations: all ways learn the same tokens, with the same mean loss; a window larger than any changes nothing."""
    windowed = load_model(files / "model")
    windowed.config = replace(windowed.config, sliding_window=128)
    save_model(windowed, Tokenizer.load(files / "model"), files / "windowed")
    first = []
    for number, (way, model) in enumerate([({"unpadded": True}, "model"), ({"packing": True}, "model"), ({}, "model"), ({}, "windowed")]):
        config = replace(quick(1, **way), conversations_per_step=16, micro_batch_size=8)
        first.append(train_sft(files / f"run{number}", files / model, files / "sft.jsonl", config).metrics()[0])
    for other in first[1:]:
        assert first[0]["tokens"] == other["tokens"]
        assert first[0]["loss_nats"] == pytest.approx(other["loss_nats"], abs=1e-5)
        assert first[0]["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)


def test_long_conversations_stop_training_or_are_left_out_with_rows_and_lengths(files):
    long = {"messages": [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": "more and " * 90}]}
    with (files / "sft.jsonl").open("a") as file:
        file.write(2 * (json.dumps(long) + "\n"))
    with pytest.raises(UserError, match=r"2 rows of more than max_seq_len=128 tokens \(row 17, 18; their lengths: 50% \d+, .*leave-out"):
        train_sft(files / "run", files / "model", files / "sft.jsonl", quick(1))
    assert not (files / "run").exists()
    told = []
    run = train_sft(files / "run", files / "model", files / "sft.jsonl", quick(1, too_long="leave-out"), warn=told.append)
    assert "left out 2 rows of more than max_seq_len=128 tokens (row 17, 18;" in told[-1]
    assert run.summary["too_long_rows"] == 2


def test_strict_trains_nothing_when_a_row_would_be_left_out_or_is_odd_trl_3781(files, capsys):
    command = [str(files / "model"), "--messages", str(files / "sft.jsonl"), "--out", str(files / "run"), "--strict", "--train.steps", "1"]
    command += ["--train.dtype", "float32", "--train.num-threads", "1"]
    good = (files / "sft.jsonl").read_text()
    for odd, said in [('{"messages": [{"role": "user"}]}', "row 17:"), (json.dumps(conversation(3)), "same as an earlier row (row 17)")]:
        (files / "sft.jsonl").write_text(good + odd + "\n")
        assert main(command) == 1
        assert said in (told := capsys.readouterr().err) and "Nothing was trained" in told
        assert not (files / "run").exists()
    (files / "sft.jsonl").write_text(good)
    assert main(command) == 0
    assert (files / "run" / "model").exists()
