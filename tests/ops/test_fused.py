"""Each fused operation against its slow twin: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from plinth.ops.attention import plain_qk_norm_rope_attention, qk_norm_rope_attention
from plinth.ops.loss import linear_cross_entropy, token_log_probs, token_scores
from plinth.ops.norm import add_rms_norm, rms_norm
from plinth.ops.rope import apply_rope, rope_table
from plinth.ops.swiglu import swiglu

EPS = 1e-6

pytestmark = pytest.mark.usefixtures("torch_kernels")  # ours have tests of their own, against float64


def leaf(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(function, *inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


def assert_same(fast, slow, inputs, tolerance):
    for a, b in zip(gradients(fast, *inputs), gradients(slow, *inputs)):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < tolerance, error


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_attention_equals_its_plain_twin(num_heads, num_kv_heads, dtype, tolerance):
    qkv = leaf(2, 7, num_heads + 2 * num_kv_heads, 16, dtype=dtype)
    cos, sin = (t.to(dtype) for t in rope_table(torch.arange(7), 16, 10_000.0))
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": EPS}
    assert_same(
        lambda x: qk_norm_rope_attention(x, cos, sin, **shape),
        lambda x: plain_qk_norm_rope_attention(x, cos, sin, **shape),
        [qkv],
        tolerance,
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_add_rms_norm_equals_its_plain_twin(dtype, tolerance):
    def plain(x, delta):
        total = x + delta
        return total, rms_norm(total, None, EPS)

    inputs = [leaf(5, 32, dtype=dtype), leaf(5, 32, seed=1, dtype=dtype)]
    assert_same(lambda x, d: add_rms_norm(x, d, EPS), plain, inputs, tolerance)
    assert_same(lambda x: add_rms_norm(x, None, EPS), lambda x: (x * 1, rms_norm(x, None, EPS)), inputs[:1], tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_swiglu_equals_its_formula(dtype, tolerance):
    assert_same(swiglu, lambda x: F.silu(x[..., :24]) * x[..., 24:], [leaf(3, 5, 48, dtype=dtype)], tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_linear_cross_entropy_equals_cross_entropy(dtype, tolerance, monkeypatch):
    monkeypatch.setattr("plinth.ops.loss.CHUNK_ELEMENTS", 50 * 4)  # several chunks, the last one short
    targets = torch.arange(11) % 50
    targets[[2, 7, 10]] = -1  # do not count
    inputs = [leaf(11, 16, dtype=dtype), leaf(50, 16, seed=1, dtype=dtype)]
    assert_same(
        lambda h, w: linear_cross_entropy(h, w, targets),
        lambda h, w: F.cross_entropy(h.float() @ w.float().T, targets, ignore_index=-1, reduction="sum"),
        inputs,
        tolerance,
    )


def test_linear_cross_entropy_scales_its_gradient():
    hidden, weight, targets = leaf(4, 8), leaf(9, 8, seed=1), torch.arange(4)
    single = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)[0]
    triple = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight, targets), hidden)[0]
    torch.testing.assert_close(triple, 3 * single)


def test_a_hopeless_prediction_costs_much_but_stays_finite():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    assert 87 < float(linear_cross_entropy(hidden, weight, torch.tensor([1]))) < 88


def test_token_log_probs_of_a_uniform_model():
    log_probs = token_log_probs(torch.zeros(3, 4), torch.ones(10, 4), torch.arange(3))
    torch.testing.assert_close(log_probs, torch.full((3,), -torch.tensor(10.0).log().item()))


def plain_scores(hidden, weight, targets, temperature):
    logs = torch.log_softmax(hidden.float() @ weight.float().T / temperature, -1)
    return logs.gather(1, targets[:, None].clamp_min(0))[:, 0] * (targets >= 0), -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("rows, width, elements", [(11, 16, 200), (11, 16, 1 << 20), (96, 32, 64 * 32), (96, 32, 1 << 20)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_equal_their_formula_in_any_chunks(rows, width, elements, dtype, tolerance, temperature, monkeypatch):
    """With shapes that our kernels take and that they do not, in several chunks, of which two are kept for the gradient, and in one."""
    monkeypatch.setattr("plinth.ops.loss.CHUNK_ELEMENTS", elements)
    monkeypatch.setattr("plinth.ops.loss.KEPT_ELEMENTS", 64 * 64)
    targets = torch.arange(rows) % 64
    targets[[2, 7, 10]] = -1  # do not count
    weights = torch.linspace(-1, 1, rows)  # unlike the gradient of a sum
    inputs = [leaf(rows, width, dtype=dtype), leaf(64, width, seed=1, dtype=dtype)]
    assert_same(
        lambda h, w: token_scores(h, w, targets, temperature=temperature)[0] * weights,
        lambda h, w: plain_scores(h, w, targets, temperature)[0] * weights,
        inputs,
        tolerance,
    )
    found, entropy = token_scores(*inputs, targets, temperature=temperature, entropy=True)
    expected = plain_scores(*inputs, targets, temperature)
    torch.testing.assert_close(found, expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy, expected[1].detach(), rtol=tolerance, atol=tolerance)
    assert found.requires_grad and not entropy.requires_grad


def test_the_gradient_of_token_log_probs_can_be_taken_twice():
    hidden, weight, targets = leaf(4, 8), leaf(9, 8, seed=1), torch.arange(4)
    found = token_log_probs(hidden, weight, targets).sum()
    first, second = (torch.autograd.grad(found, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_rope_turns_by_the_distance_only():
    q, k = leaf(16).detach(), leaf(16, seed=1).detach()
    cos, sin = rope_table(torch.arange(40), 16, 10_000.0)
    near = apply_rope(q, cos[7], sin[7]) @ apply_rope(k, cos[3], sin[3])
    far = apply_rope(q, cos[37], sin[37]) @ apply_rope(k, cos[33], sin[33])
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apply_rope(q, cos[0], sin[0]), q)


def test_rms_norm_of_a_row_worked_by_hand():
    y = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(y, torch.tensor([3.0, 8.0]) / 12.5**0.5)
