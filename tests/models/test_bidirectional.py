"""Plain multi-head attention: against PyTorch's own module, against its slow twin, and its masks."""

import pytest
import torch
from torch import nn

from plinth.models.bidirectional import BiasedLinear, MultiHeadAttention, key_mask


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def torch_twin(ours: MultiHeadAttention, hidden_size: int) -> nn.MultiheadAttention:
    """Return PyTorch's module with the same weights."""
    twin = nn.MultiheadAttention(hidden_size, ours.num_heads, batch_first=True)
    projections = [ours.q, ours.kv] if ours.is_cross else [ours.qkv]
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([part.weight for part in projections]))
        twin.in_proj_bias.copy_(torch.cat([part.bias for part in projections]))
        twin.out_proj.weight.copy_(ours.out.weight)
        twin.out_proj.bias.copy_(ours.out.bias)
    return twin


@pytest.mark.parametrize("cross", [False, True])
def test_attention_and_its_weights_are_pytorchs(cross):
    ours = drawn(MultiHeadAttention(16, 4, cross=cross))
    x, context = numbers(2, 5, 16), numbers(2, 7, 16, seed=2) if cross else None
    other = context if cross else x
    seen = torch.ones(2, other.shape[1], dtype=torch.bool)
    seen[1, 3:] = False
    expected, weights = torch_twin(ours, 16)(x, other, other, key_padding_mask=~seen, average_attn_weights=False)
    torch.testing.assert_close(ours(x, context, key_mask(seen)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weights(x, context, key_mask(seen)), weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_reads_with_the_weights_that_are_told(masked, biased, causal):
    ours = drawn(MultiHeadAttention(12, 3, 6, bias=False, scale=1.0))
    x = numbers(2, 5, 12)
    mask = key_mask(torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])) if masked else None
    bias = numbers(1, 3, 5, 5, seed=3) if biased else None
    weights = ours.weights(x, mask=mask, bias=bias, causal=causal)
    _, _, values = ours.project(x)
    torch.testing.assert_close(ours(x, mask=mask, bias=bias, causal=causal), ours.out((weights @ values).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    if causal:
        assert weights.triu(1).abs().max() == 0


def test_queries_behind_a_cache_see_all_of_it():
    ours = drawn(MultiHeadAttention(8, 2))
    x = numbers(1, 6, 8)
    query, key, value = ours.project(x)
    whole = ours(x, causal=True)
    torch.testing.assert_close(ours.attend(query[:, :, 4:], key, value, causal=True), whole[:, 4:])
    torch.testing.assert_close(ours.attend(query[:, :, 5:], key, value, causal=True), whole[:, 5:])


def test_a_biased_matrix_gives_the_same_with_and_without_the_kernel():
    layer = drawn(BiasedLinear(64, 32)).to(torch.bfloat16)
    x = numbers(2, 32, 64).to(torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, atol=0.05, rtol=0.02)
    layer(x).float().square().sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
