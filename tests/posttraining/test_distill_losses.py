"""Divergences of two next-token distributions against loops, their limits, and the chunked loss against the whole one."""

import math

import pytest
import torch

from plinth.config import UserError
from plinth.posttraining.distill_losses import DIVERGENCES, Head, chunked_distillation_loss, distillation_loss, divergence


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, TARGETS = random(5, 7, seed=1), random(5, 7, seed=2), torch.tensor([3, -1, 0, 6, -100])


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q))


def mixed_jsd(s, t, beta):
    m = [beta * y + (1 - beta) * x for x, y in zip(s, t)]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


LOOPS = {
    "forward_kl": lambda s, t: kl(t, s),
    "reverse_kl": lambda s, t: kl(s, t),
    "symmetric_kl": lambda s, t: (kl(s, t) + kl(t, s)) / 2,
    "jsd": lambda s, t: mixed_jsd(s, t, 0.5),
    "total_variation": lambda s, t: sum(abs(x - y) for x, y in zip(s, t)) / 2,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_equals_a_loop_and_its_gradient_finite_differences(name):
    rows = zip((STUDENT / 2).softmax(-1).tolist(), (TEACHER / 2).softmax(-1).tolist())
    expected = torch.tensor([LOOPS[name](s, t) for s, t in rows], dtype=torch.float64)
    torch.testing.assert_close(divergence(name, STUDENT, TEACHER, temperature=2.0), expected, rtol=1e-12, atol=1e-12)
    assert divergence(name, STUDENT, STUDENT).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: divergence(name, x, TEACHER), [STUDENT.clone().requires_grad_()])


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_the_weighted_jensen_shannon_divergence(beta):
    rows = zip(STUDENT.softmax(-1).tolist(), TEACHER.softmax(-1).tolist())
    expected = torch.tensor([mixed_jsd(s, t, beta) for s, t in rows], dtype=torch.float64)
    torch.testing.assert_close(divergence("jsd", STUDENT, TEACHER, beta=beta), expected)


def test_near_its_ends_the_jensen_shannon_divergence_has_the_slope_of_a_kl():
    small = 1e-6
    near = divergence("jsd", STUDENT, TEACHER, beta=small) / small
    torch.testing.assert_close(near, divergence("forward_kl", STUDENT, TEACHER), rtol=1e-4, atol=1e-4)
    near = divergence("jsd", STUDENT, TEACHER, beta=1 - small) / small
    torch.testing.assert_close(near, divergence("reverse_kl", STUDENT, TEACHER), rtol=1e-4, atol=1e-4)


def test_cross_entropy_and_temperature():
    counted = TARGETS >= 0
    total, count = distillation_loss(STUDENT, TEACHER, TARGETS, temperature=3.0, share=0.25)
    hard = torch.nn.functional.cross_entropy(STUDENT[counted], TARGETS[counted], reduction="sum")
    soft = divergence("forward_kl", STUDENT, TEACHER, temperature=3.0)[counted].sum()
    assert count == 3 and float(total) == pytest.approx(float(0.75 * hard + 0.25 * 9 * soft), rel=1e-12)


def test_t_squared_keeps_the_size_of_the_gradient():
    sizes = []
    for temperature in (50.0, 100.0):
        logits = STUDENT.clone().requires_grad_()
        distillation_loss(logits, TEACHER, TARGETS, temperature=temperature)[0].backward()
        sizes.append(float(logits.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_chunks_change_neither_loss_nor_gradient(name):
    weight, other = random(7, 4, seed=3), random(7, 6, seed=4)
    hidden, teacher_hidden = random(5, 4, seed=5), random(5, 6, seed=6)
    results = []
    for rows in (None, 2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if rows is None:
            total, count = distillation_loss(h @ w.T, teacher_hidden @ other.T, TARGETS, name=name, share=0.5)
        else:
            heads = Head(h, w), Head(teacher_hidden, other)
            total, count, measures = chunked_distillation_loss(*heads, TARGETS, rows=rows, name=name, share=0.5)
        total.backward()
        results.append((total.detach(), count, h.grad, w.grad))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(torch.as_tensor(chunked), torch.as_tensor(whole), rtol=1e-12, atol=1e-12)


def test_options_are_checked():
    for options, text in (({"name": "kl"}, "is not one of forward_kl"), ({"name": "jsd", "beta": 2.0}, r"beta=2.0 is not in \[0, 1\]")):
        with pytest.raises(UserError, match=text):
            distillation_loss(STUDENT, TEACHER, TARGETS, **options)
    with pytest.raises(UserError, match="temperature=0 must be positive"):
        divergence("jsd", STUDENT, TEACHER, temperature=0)
