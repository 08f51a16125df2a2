"""The cost model against the real model: parameters, operations and kept bytes agree to the last unit."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plinth.models.config import DecoderConfig
from plinth.models.cost import (
    activation_bytes_per_token,
    count_params,
    decode_bytes_per_token,
    forward_flops_per_token,
    kv_bytes_per_token,
    least_tokens_for_muon,
    muon_cost_share,
    optimizer_by_cost,
    train_flops_per_token,
    train_memory_bytes,
)
from plinth.models.kv_cache import PagedCache
from plinth.models.transformer import Transformer
from plinth.ops.kernels import library, why_not
from plinth.ops.loss import linear_cross_entropy

SHAPES = {
    "even": DecoderConfig(vocab_size=101, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=3, head_dim=8, intermediate_size=40),
    "grouped": DecoderConfig(vocab_size=64, hidden_size=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=32),
    "untied": DecoderConfig(
        vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=24,
        tie_embeddings=False, learnable_norm=True,
    ),
}  # fmt: skip
BATCH, LENGTH = 2, 12


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def config(request) -> DecoderConfig:
    return SHAPES[request.param]


def summed_loss(model: Transformer) -> torch.Tensor:
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % model.config.vocab_size
    return linear_cross_entropy(model(tokens).flatten(0, 1), model.output_weight, tokens.flatten())


def test_parameters_are_those_of_the_model(config):
    model = Transformer(config)
    counts = count_params(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["matrix"] == sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    assert counts["embedding"] == model.embed.weight.numel() + (0 if model.head is None else model.head.weight.numel())
    assert counts["total"] == counts["embedding"] + counts["non_embedding"]


def test_parameters_of_a_shape_worked_by_hand():
    config = DecoderConfig(vocab_size=10, hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2, intermediate_size=3)
    assert count_params(config) == {"total": 40 + 32 + 16 + 36, "embedding": 40, "non_embedding": 84, "matrix": 84}


@pytest.mark.parametrize("name", ["even", "grouped"])
def test_operations_are_those_that_torch_counts(name):
    config = SHAPES[name]
    model = Transformer(config)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.logits(model(torch.zeros(BATCH, LENGTH, dtype=torch.long)))
    assert forward.get_total_flops() == BATCH * LENGTH * forward_flops_per_token(config, LENGTH, causal=False)
    with FlopCounterMode(display=False) as step:
        summed_loss(model).backward()
    assert step.get_total_flops() == BATCH * LENGTH * train_flops_per_token(config, LENGTH, causal=False)


def test_causal_operations_sum_over_attended_positions(config):
    attended = sum(position + 1 for position in range(LENGTH))
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * attended
    matrices = forward_flops_per_token(config, LENGTH, causal=False) - 4 * config.num_layers * config.num_heads * config.head_dim * LENGTH
    assert forward_flops_per_token(config, LENGTH) * LENGTH == matrices * LENGTH + attention


@pytest.mark.parametrize("name", ["even", "grouped"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_kept_bytes_are_those_that_autograd_keeps(name, dtype, size, torch_kernels):
    config = SHAPES[name]
    rotation = 2 * LENGTH * config.head_dim * size
    assert kept_bytes(config, dtype, LENGTH) - rotation == BATCH * LENGTH * activation_bytes_per_token(config, LENGTH, size)


@pytest.mark.skipif(library() is None, reason=f"no kernels of ours here: {why_not()}")
@pytest.mark.parametrize("name", ["even", "grouped"])
def test_kept_bytes_with_our_kernels(name):
    config = replace(SHAPES[name], head_dim=32, hidden_size=32, intermediate_size=64)
    rotation = 2 * 32 * config.head_dim * 4
    found = kept_bytes(config, torch.bfloat16, 32) - rotation
    assert found == BATCH * 32 * activation_bytes_per_token(config, 32, 2, own_kernels=True)


def kept_bytes(config, dtype, length):
    """Return the bytes that autograd keeps of a forward pass, the rotation table included, tokens and weights not."""
    model = Transformer(config).to(dtype)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    tokens = torch.zeros(BATCH, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens)
    assert hidden.dtype == dtype
    return sum(t.untyped_storage().nbytes() for t in kept.values()) - tokens.nbytes


def test_the_optimizer_follows_from_what_muon_costs():
    assert muon_cost_share(384, 16_384) == pytest.approx(0.117, abs=1e-3)
    assert [optimizer_by_cost(384, tokens) for tokens in (16_384, 4096, 4084)] == ["muon", "muon", "adamw"]  # 0.12, 0.469, 0.4701
    least = least_tokens_for_muon(384)
    assert optimizer_by_cost(384, int(least) + 1) == "muon" and optimizer_by_cost(384, int(least) - 1) == "adamw"


def test_cache_bytes_are_those_of_the_cache(config):
    cache = PagedCache(config, num_blocks=3, block_tokens=8, dtype=torch.bfloat16)
    assert cache.keys.nbytes + cache.values.nbytes == cache.bytes == 3 * 8 * kv_bytes_per_token(config, dtype_bytes=2)


def test_decoding_reads_weights_once_a_batch(config):
    one = decode_bytes_per_token(config, context_tokens=10, weight_bytes=2, cache_bytes=2)
    four = decode_bytes_per_token(config, context_tokens=10, batch_size=4, weight_bytes=2, cache_bytes=2)
    row = 0 if config.tie_embeddings else 2 * config.hidden_size
    own = 10 * kv_bytes_per_token(config, 2) + row
    unread = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    assert one - own == 2 * (count_params(config)["total"] - unread)
    assert four - own == -(-(one - own) // 4)


def test_training_memory_by_hand():
    config = SHAPES["even"]
    counts = count_params(config)
    adamw = train_memory_bytes(config, BATCH, LENGTH)
    assert (adamw.weights, adamw.gradients, adamw.optimizer) == tuple(counts["total"] * n for n in (4, 4, 8))
    muon = train_memory_bytes(config, BATCH, LENGTH, compute_bytes=2, muon=True)
    assert (muon.weights, muon.gradients) == (counts["total"] * 6, counts["total"] * 2)
    assert adamw.optimizer - muon.optimizer == 4 * counts["matrix"]
    assert adamw.activations == 2 * muon.activations
    one, two = (train_memory_bytes(config, BATCH, LENGTH, compute_bytes=2, head_tokens=n).head for n in (1, 2))
    assert two - one == config.vocab_size * (4 + 4 + 2)  # logits, probabilities, their gradient in bf16
    assert adamw.total == adamw.weights + adamw.gradients + adamw.optimizer + adamw.activations + adamw.head
