"""What a decoder with experts costs: against the real model, PyTorch's own counter, autograd's memory and published numbers."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plinth.models.config import DecoderConfig
from plinth.models.cost import (
    activation_bytes_per_token,
    count_active_params,
    count_params,
    decode_bytes_per_token,
    forward_flops_per_token,
    train_flops_per_token,
)
from plinth.models.counts.families import count
from plinth.models.formats.decoder_config import write_config
from plinth.models.transformer import Transformer
from plinth.training.objectives import causal_lm_loss

ROUTED = DecoderConfig(
    vocab_size=50, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24, max_seq_len=64,
    num_experts=6, num_active_experts=2, expert_intermediate_size=12,
)  # fmt: skip
SHAPES = {
    "routed": ROUTED,
    "shared": replace(ROUTED, shared_expert_intermediate_size=20, shared_expert_gate=True, dense_layers=(0,), learnable_norm=True),
}
MIXTRAL = DecoderConfig(
    vocab_size=32_000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14_336,
    learnable_norm=True, tie_embeddings=False, qk_norm=False, num_experts=8, num_active_experts=2,
)  # fmt: skip
QWEN3 = DecoderConfig(
    vocab_size=151_936, hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, intermediate_size=6144,
    learnable_norm=True, tie_embeddings=False, num_experts=128, num_active_experts=8, expert_intermediate_size=768,
)  # fmt: skip
ROWS, LENGTH = 2, 16


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def config(request) -> DecoderConfig:
    return SHAPES[request.param]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % ROUTED.vocab_size
    return tokens, tokens


def test_parameters_are_those_of_the_model(config):
    model, counts = Transformer(config), count_params(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["matrix"] == sum(model.get_parameter(name).numel() for name in model.matrix_parts())


def test_a_token_uses_the_model_without_the_experts_that_it_does_not_take(config):
    model = Transformer(config)
    expert = 3 * config.hidden_size * config.expert_size
    layers = sum(config.has_experts(i) for i in range(config.num_layers))
    assert count_active_params(config) == sum(p.numel() for p in model.parameters()) - layers * 4 * expert
    dense = replace(config, num_experts=0, expert_intermediate_size=None, shared_expert_intermediate_size=0, shared_expert_gate=False,
                    dense_layers=())  # fmt: skip
    assert count_active_params(dense) == count_params(dense)["total"]


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(MIXTRAL, 46_702_792_704, 12_879_925_248), (QWEN3, 30_532_122_624, 3_353_032_704)],
    ids=["Mixtral-8x7B", "Qwen3-30B-A3B"],
)
def test_published_models(config, total, active):
    assert count_params(config)["total"] == total
    assert count_active_params(config) == active


def test_operations_are_those_that_torch_counts(config):
    model, (tokens, targets) = Transformer(replace(config, learnable_norm=False)), batch()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.logits(model(tokens))
    assert forward.get_total_flops() == ROWS * LENGTH * forward_flops_per_token(config, LENGTH, causal=False)
    with FlopCounterMode(display=False) as step:
        causal_lm_loss(model, (tokens, targets))[0].backward()
    head = 6 * config.vocab_size * config.hidden_size  # which runs on rows filled up to a multiple
    found = step.get_total_flops() / (ROWS * LENGTH)
    assert found == pytest.approx(train_flops_per_token(config, LENGTH, causal=False), abs=4 * head)


def test_kept_bytes_are_near_those_that_autograd_keeps(config, torch_kernels):
    config = replace(config, learnable_norm=False, hidden_size=128, expert_intermediate_size=256, intermediate_size=256, num_layers=2)
    model, (tokens, _) = Transformer(config), batch()
    ours, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert found == pytest.approx(ROWS * LENGTH * activation_bytes_per_token(config, LENGTH), rel=0.03)


def test_decoding_reads_the_experts_that_its_sequences_take():
    sizes = [decode_bytes_per_token(ROUTED, 0, batch_size=n, weight_bytes=1) * n for n in (1, 2, 3, 4)]
    expert = 3 * ROUTED.hidden_size * ROUTED.expert_size * ROUTED.num_layers
    assert [b - a for a, b in zip(sizes, sizes[1:])] == pytest.approx([2 * expert, 2 * expert, 0], abs=4)  # each is rounded up


@pytest.mark.parametrize("options", [{}, {"qk_norm": False}, {"shared_expert_intermediate_size": 20, "dense_layers": (0, 2)}])
def test_the_closed_forms_of_published_models_agree(options):
    config = replace(ROUTED, learnable_norm=True, **options)
    ledger = count(write_config(config))
    assert ledger.total == count_params(config)["total"] and ledger.active == count_active_params(config)
    assert ledger.forward_flops(100, attention="causal") == 100 * forward_flops_per_token(config, 100)
