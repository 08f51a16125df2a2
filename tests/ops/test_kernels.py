"""Our kernels against float64, and the way out where they cannot run."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from plinth.ops import kernels
from plinth.ops.attention import kernel_attention, qk_norm_rope_attention
from plinth.ops.linear import WeightGradient, collect_gradients, linear
from plinth.ops.loss import linear_cross_entropy
from plinth.ops.norm import add_rms_norm
from plinth.ops.rope import rope_table, swap_halves
from plinth.ops.swiglu import swiglu

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels of ours here: {kernels.why_not()}")
EPS = 1e-6
ROUNDING = 6e-3  # of a tensor's norm: two or three roundings to bf16, 1 in 512 each


def leaf(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()


def assert_close_to_float64(fast, exact, *inputs):
    """Compare values and gradients in bf16 with those of the same numbers in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, wanted = fast(*inputs), exact(*wide)
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).bfloat16() for x in got]
    grads = torch.autograd.grad(got, inputs, weights)
    exact_grads = torch.autograd.grad(wanted, wide, [w.double() for w in weights])
    for a, b in zip([*got, *grads], [*wanted, *exact_grads]):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < ROUNDING, error


SHAPES = [(2, 64, 2, 2, 32), (1, 50, 4, 2, 64), (3, 97, 2, 1, 128), (1, 33, 3, 1, 96), (2, 1, 2, 2, 32), (1, 256, 4, 4, 64)]


def exact_attention(qkv, H, K, rotation=None, scale=None, normed=False):
    q, k, v = qkv.split((H, K, K), 2)
    if normed:
        q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) for x in (q, k))
    if rotation is not None:
        cos, sin = (x.double()[:, None] for x in rotation)
        q, k = (x * cos + swap_halves(x) * sin for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale).transpose(1, 2).flatten(2)


@needs_kernels
@pytest.mark.parametrize("B, T, H, K, E", SHAPES)
def test_attention(B, T, H, K, E):
    table = rope_table(torch.arange(T), E, 10_000.0)
    ours = lambda qkv: qk_norm_rope_attention(qkv, *table, num_heads=H, num_kv_heads=K, eps=EPS)  # noqa: E731
    assert_close_to_float64(ours, lambda qkv: exact_attention(qkv, H, K, table, normed=True), leaf(B, T, H + 2 * K, E))


@needs_kernels
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("B, T, H, K, E", SHAPES)
def test_attention_without_norm(B, T, H, K, E, rotated):
    table = rope_table(torch.arange(T), E, 10_000.0, 1.2) if rotated else (None, None)
    ours = lambda qkv: kernel_attention(qkv, *table, num_heads=H, num_kv_heads=K, scale=0.1)  # noqa: E731
    assert_close_to_float64(ours, lambda qkv: exact_attention(qkv, H, K, table if rotated else None, 0.1), leaf(B, T, H + 2 * K, E))


@needs_kernels
def test_attention_of_scores_beyond_what_an_exponential_holds():
    """Each query is its own key, times 60: alike rows score 200,000 nats, and only the order of scores is left."""
    rows = torch.eye(64)[torch.arange(40) % 4] * 60.0
    values = leaf(40, 64).detach()
    qkv = torch.stack((rows, rows, values.float()), 1)[None].bfloat16()
    attend = lambda x: kernel_attention(x, None, None, num_heads=1, num_kv_heads=1, scale=60.0)  # noqa: E731
    got = attend(qkv.requires_grad_())
    torch.testing.assert_close(got.double(), exact_attention(qkv.double(), 1, 1, scale=60.0), atol=0.02, rtol=0.02)
    assert torch.autograd.grad(got.sum(), qkv)[0].isfinite().all()


@needs_kernels
def test_attention_looks_at_no_later_row():
    cos, sin = rope_table(torch.arange(70), 64, 10_000.0)
    qkv = leaf(1, 70, 6, 64).detach()
    attend = lambda x: qk_norm_rope_attention(x, cos, sin, num_heads=2, num_kv_heads=2, eps=EPS)  # noqa: E731
    changed = qkv.clone()
    changed[:, 41:] = 7.0
    assert torch.equal(attend(qkv)[:, :41], attend(changed)[:, :41])


@needs_kernels
@pytest.mark.parametrize("width", [16, 40, 256, 1000])
def test_norm(width):
    def exact(x, delta):
        total = x + delta
        return total, total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)

    assert_close_to_float64(lambda x, d: add_rms_norm(x, d, EPS), exact, leaf(3, 5, width), leaf(3, 5, width, seed=1))
    assert_close_to_float64(lambda x: add_rms_norm(x, None, EPS)[1], lambda x: exact(x, 0)[1], leaf(7, width))


@needs_kernels
@pytest.mark.parametrize("width", [16, 23, 672])
def test_swiglu(width):
    assert_close_to_float64(swiglu, lambda x: F.silu(x[..., :width]) * x[..., width:], leaf(3, 5, 2 * width))


@needs_kernels
@pytest.mark.parametrize("rows, out, width", [(32, 32, 32), (96, 64, 32), (800, 96, 64), (320, 1056, 64), (64, 32, 608)])
def test_linear(rows, out, width):
    assert_close_to_float64(linear, F.linear, leaf(rows, width), leaf(out, width, seed=1))


@needs_kernels
@pytest.mark.parametrize("chunk", [1 << 21, 96 * 64])
def test_cross_entropy(chunk, monkeypatch):
    monkeypatch.setattr("plinth.ops.loss.CHUNK_ELEMENTS", chunk)  # one chunk, or several and the last one short
    targets = torch.randint(96, (224,), generator=torch.Generator().manual_seed(2))
    targets[[0, 5, 223]] = -1
    exact = lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=-1, reduction="sum")  # noqa: E731
    assert_close_to_float64(lambda h, w: linear_cross_entropy(h, w, targets), exact, leaf(224, 32), leaf(96, 32, seed=1))


@needs_kernels
def test_cross_entropy_of_a_sure_model_is_not_cut():
    hidden, weight = torch.zeros(32, 32).bfloat16(), torch.zeros(32, 32).bfloat16()
    hidden[:, 0], weight[0, 0] = 16.0, 16.0
    loss = linear_cross_entropy(hidden, weight, torch.ones(32, dtype=torch.long))
    assert loss.item() == pytest.approx(32 * 256.0, rel=1e-6)


@needs_kernels
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_collected_gradients_are_those_of_autograd(factor):
    w, v = leaf(96, 64, seed=1), leaf(128, 96, seed=2)
    batches = [(leaf(64, 64, seed=3 + i), torch.arange(64) + i) for i in range(3)]
    loss = lambda x, y: factor * linear_cross_entropy(linear(x, w), v, y)  # noqa: E731
    exact = torch.autograd.grad(
        sum(factor * F.cross_entropy(F.linear(F.linear(x.double(), w.double()), v.double()), y, reduction="sum") for x, y in batches),
        (w, v),
    )
    with collect_gradients() as sums:
        for x, y in batches:
            given = torch.autograd.grad(loss(x, y), (w, v), allow_unused=True)
            assert given == (None, None)
    for weight, wanted in zip((w, v), exact):
        start = torch.ones(weight.shape)
        found = WeightGradient.gather([*sums.filled(weight), *sums.filled(weight)], start)  # as if from two threads, on top of another
        error = ((found.double() - 1) / 2 - wanted.double()).norm() / wanted.double().norm()
        assert error < 5 * ROUNDING, error  # sharp logits, rounded: PyTorch's own bf16 products give 2 % here as well


@needs_kernels
def test_results_are_the_same_bits_every_time():
    x, w, targets = leaf(96, 64), leaf(96, 64, seed=1), torch.arange(96)
    runs = [torch.autograd.grad(linear_cross_entropy(linear(x, w[:64]), w, targets), (x, w)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_without_our_kernels_the_operations_still_run(torch_kernels):
    assert kernels.library() is None
    assert "PLINTH_KERNELS" in kernels.why_not()
    x, w = leaf(64, 32), leaf(32, 32, seed=1)
    assert_close_to_float64(linear, F.linear, x, w)


@pytest.mark.skipif(kernels.library() is None, reason="nothing to build here")
def test_a_broken_compiler_is_named_and_nothing_breaks(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: cannot compile today' >&2\nexit 1\n")
    compiler.chmod(0o755)
    code = "from plinth.ops import kernels; print(kernels.why_not()); print(kernels.library())"
    env = {**os.environ, "CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == ["the C compiler failed: cc: cannot compile today", "None"]
    assert not list((tmp_path / "cache" / "plinth").iterdir())
