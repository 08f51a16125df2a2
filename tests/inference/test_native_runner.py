"""The native runner: close to the model's own fp32 forward, and the same bits in any company."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch

from plinth.config import UserError
from plinth.inference.native_runner import NativeRunner, why_not_native
from plinth.inference.runner import BLOCK_TOKENS, Rows
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops import kernels
from plinth.ops.quantise import dequantise, quantise

REASON = why_not_native(DecoderConfig())
needs_native = pytest.mark.skipif(REASON is not None, reason=f"no native runner here: {REASON}")

SHAPES = {
    "plain": {"vocab_size": 512, "hidden_size": 128, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 256},
    "grouped, ragged": {"vocab_size": 211, "hidden_size": 72, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 100},
    "scales, soft cap, own head": {
        "vocab_size": 300, "hidden_size": 200, "num_heads": 3, "num_kv_heads": 1, "head_dim": 96, "intermediate_size": 90,
        "learnable_norm": True, "logit_softcap": 4.0, "tie_embeddings": False,
    },
    "many queries a key, multipliers": {
        "vocab_size": 97, "hidden_size": 64, "num_heads": 20, "num_kv_heads": 1, "head_dim": 128, "intermediate_size": 64,
        "attention_multiplier": 1.5, "output_multiplier": 0.5,
    },
}  # fmt: skip


def random_model(shape: str = "plain", max_seq_len: int = 512, seed: int = 7) -> Transformer:
    model = Transformer(DecoderConfig(num_layers=2, max_seq_len=max_seq_len, **SHAPES[shape]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def random_tokens(model: Transformer, length: int, seed: int = 3) -> list[int]:
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def call(parts: list[tuple[list[int], int, list[int]]]) -> Rows:
    """Return the rows of several sequences, each (tokens, position of the first, blocks); the logits of all are wanted."""
    tables = np.zeros((len(parts), max(len(blocks) for _, _, blocks in parts)), np.int32)
    for i, (_, _, blocks) in enumerate(parts):
        tables[i, : len(blocks)] = blocks
    lengths = [len(tokens) for tokens, _, _ in parts]
    return Rows(
        tokens=np.concatenate([tokens for tokens, _, _ in parts]).astype(np.int32),
        positions=np.concatenate([np.arange(start, start + n) for (_, start, _), n in zip(parts, lengths)]).astype(np.int32),
        sequences=np.repeat(np.arange(len(parts)), lengths).astype(np.int32),
        block_tables=tables,
        wanted=np.arange(sum(lengths), dtype=np.int32),
        prefill=np.ones(sum(lengths), bool),
    )


def runner_of(model: Transformer, num_blocks: int = 64, **options) -> NativeRunner:
    runner = NativeRunner(model, **options)
    runner.allocate(num_blocks)
    return runner


def read(runner: NativeRunner, tokens: list[int], blocks: list[int], cuts=()) -> torch.Tensor:
    """Return the logits of all places, the sequence read in pieces."""
    edges = [0, *cuts, len(tokens)]
    return torch.cat([runner.forward(call([(tokens[a:b], a, blocks)])).clone() for a, b in zip(edges, edges[1:])])


@needs_native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 40, 150])
def test_logits_are_those_of_the_model(shape, length):
    model = random_model(shape)
    tokens = random_tokens(model, length)
    with torch.no_grad():
        hidden = model(torch.tensor([tokens]))[0]
        wanted = model.logits(hidden)
        model_bf16 = random_model(shape).bfloat16()
        coarse = model_bf16.logits(model_bf16(torch.tensor([tokens])))[0].float()
    runner = runner_of(model, num_threads=2)
    got = read(runner, tokens, list(range(9, 3, -1)))
    error, error_torch = ((x - wanted).norm() / wanted.norm() for x in (got, coarse))
    assert error < 0.025 and error < 1.2 * error_torch  # roundings to bf16, fewer than PyTorch makes in a model in bf16
    got_hidden = runner.hidden(call([(tokens, 0, list(range(9, 3, -1)))]))
    assert (got_hidden - hidden).norm() / hidden.norm() < 0.025


@needs_native
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_logits_are_those_of_the_rounded_weights(shape, weights):
    """What is left is the rounding of the rows to int8 and of keys and values to bf16."""
    model = random_model(shape)
    runner = runner_of(model, weights=weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(dequantise(quantise(parameter, weights if name.startswith("layers") else "int8")))
        tokens = random_tokens(model, 70)
        wanted = model.logits(model(torch.tensor([tokens]))[0])
    got = read(runner, tokens, [2, 1, 0])
    assert (got - wanted).norm() / wanted.norm() < 0.05


@needs_native
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_cuts_blocks_or_threads(shape, weights):
    model = random_model(shape)
    tokens = random_tokens(model, 131)
    alone = read(runner_of(model, num_threads=1, weights=weights), tokens, [0, 1, 2, 3, 4])
    one_by_one = read(runner_of(model, num_threads=2, weights=weights), tokens, [7, 3, 60, 1, 9], range(1, 131))
    in_pieces = read(runner_of(model, num_threads=3, weights=weights), tokens, [5, 4, 3, 2, 1], (1, 18, 50, 64, 65, 130))
    assert torch.equal(alone, one_by_one) and torch.equal(alone, in_pieces)


@needs_native
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("count", [2, 3, 15, 16, 17, 33, 64])
def test_bits_do_not_depend_on_company(count, weights):
    model = random_model("grouped, ragged")
    lone, shared = (runner_of(model, 2 * n, num_threads=k, weights=weights) for n, k in ((1, 1), (count, 2)))
    prompts = [random_tokens(model, 1 + 7 * i % 50, seed=i) for i in range(count)]
    blocks = [[2 * i + 1, 2 * i] for i in range(count)]
    together = shared.forward(call([(prompt, 0, own) for prompt, own in zip(prompts, blocks)])).clone()
    alone = [lone.forward(call([(prompt, 0, [1, 0])])).clone() for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))
    following = shared.forward(call([([5], len(prompt), own) for prompt, own in zip(prompts, blocks)])).clone()
    for i in (0, 1, count - 1):
        assert torch.equal(following[i], read(lone, [*prompts[i], 5], [0, 1])[-1])


@needs_native
def test_only_wanted_rows_and_empty_calls():
    runner = runner_of(model := random_model())
    rows = call([(random_tokens(model, 70), 0, [0, 1, 2])])
    every = runner.forward(rows).clone()
    some = Rows(**{**vars(rows), "wanted": np.array([3, 69], np.int32)})
    assert torch.equal(runner.forward(some), every[[3, 69]])
    none = Rows(**{**vars(rows), "wanted": np.array([], np.int32)})
    assert runner.forward(none).shape == (0, model.config.vocab_size)


@needs_native
def test_a_fork_goes_on_from_copied_blocks():
    runner = runner_of(model := random_model())
    tokens = random_tokens(model, 50)
    read(runner, tokens, [0, 1])
    runner.copy_blocks([(1, 2)])
    read(runner, [9] * 5, [1])  # its old block is someone else's now
    assert torch.equal(runner.forward(call([([4], 50, [0, 2])])).clone()[0], read(runner, [*tokens, 4], [5, 6])[-1])


@needs_native
def test_sequences_of_one_call_may_share_blocks_that_it_writes():
    runner = runner_of(model := random_model())
    tokens = random_tokens(model, 40)
    rows = call([(tokens[:32], 0, [0]), (tokens[32:], 32, [0, 1])])
    assert torch.equal(runner.forward(rows).clone(), read(runner, tokens, [2, 3]))


@needs_native
def test_damaged_weights_hurt_only_those_who_use_them():
    model = random_model()
    clean = read(runner_of(model), tokens := [1, 2, 3] * 15, [0, 1])
    with torch.no_grad():
        model.embed.weight[400] = float("nan")  # the head's row as well
    runner = runner_of(model)
    got = runner.forward(call([([400, 1, 2], 0, [2]), (tokens, 0, [0, 1])])).clone()
    assert got[:3].isnan().all() and torch.equal(got[3:, :400], clean[:, :400])
    assert read(runner, [400] * 64, [0, 1]).isnan().all()
    assert torch.equal(read(runner, tokens, [0, 1])[:, :400], clean[:, :400])  # blocks keep nothing of their former owner


@needs_native
def test_the_model_may_be_dropped_and_weights_replaced():
    first, second = random_model(seed=1), random_model(seed=2)
    runner = runner_of(first)
    tokens = random_tokens(first, 40)
    runner.reload(second)
    assert torch.equal(read(runner, tokens, [0, 1]), read(runner_of(second), tokens, [0, 1]))
    with pytest.raises(UserError, match="same configuration"):
        runner.reload(random_model("grouped, ragged"))


@needs_native
def test_weights_and_blocks_are_counted_in_bytes():
    runner = runner_of(model := random_model(), 10)
    assert runner.weight_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert runner.block_bytes() * 10 == runner._keys.nbytes + runner._values.nbytes == 10 * 2 * 2 * 2 * 2 * 64 * BLOCK_TOKENS


@needs_native
def test_what_it_cannot_run_is_said():
    assert "head_dim=10" in why_not_native(DecoderConfig(head_dim=10))
    with pytest.raises(UserError, match="head_dim=16.*weights=fp32"):
        NativeRunner(Transformer(DecoderConfig(head_dim=16, num_layers=1)))


def test_without_the_kernels_the_reason_is_given(torch_kernels):
    assert "PLINTH_KERNELS" in why_not_native(DecoderConfig())


@needs_native
def test_engines_of_several_threads_take_turns():
    model = random_model()
    tokens = random_tokens(model, 60)
    wanted = read(runner_of(model), tokens, [0, 1])
    results = {}

    def work(i: int) -> None:
        runner = runner_of(model, num_threads=1 + i)
        results[i] = [read(runner, tokens, [0, 1], range(1, 60)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(torch.equal(got, wanted) for part in results.values() for got in part)


def _in_child(runner, tokens, queue) -> None:
    queue.put(read(runner, tokens, [0, 1]).numpy())


@needs_native
def test_a_forked_process_makes_its_own_threads():
    runner = runner_of(model := random_model(), num_threads=2)
    tokens = random_tokens(model, 40)
    wanted = read(runner, tokens, [0, 1])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(runner, tokens, queue))
    child.start()
    got = queue.get(timeout=60)
    child.join()
    assert np.array_equal(got, wanted.numpy()) and torch.equal(read(runner, tokens, [0, 1]), wanted)


@needs_native
def test_threads_end_when_asked_and_come_back():
    runner = runner_of(model := random_model(), num_threads=3)
    tokens = random_tokens(model, 40)
    wanted = read(runner, tokens, [0, 1])
    kernels.library().end_threads()
    assert torch.equal(read(runner, tokens, [0, 1]), wanted)
