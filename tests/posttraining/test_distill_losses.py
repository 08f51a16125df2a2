"""Divergences of two next-token distributions against loops, their limits, and the chunked loss against the whole one."""

import itertools
import math

import pytest
import torch

from plinth.config import UserError
from plinth.posttraining.distill_losses import (
    DIVERGENCES,
    Head,
    TopTokens,
    chunked_distillation_loss,
    distillation_loss,
    divergence,
    later_returns,
    top_distillation_loss,
)


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


def top_of(logits, count, temperature=1.0):
    """A teacher's file, as one that knows all logits writes it."""
    logs = (logits / temperature).log_softmax(-1)
    kept, ids = logs.topk(count, -1)
    rest = logs.scatter(1, ids, -math.inf).logsumexp(-1)
    return TopTokens(ids, kept, rest, logits.log_softmax(-1).gather(1, TARGETS.clamp(min=0)[:, None])[:, 0], logits.shape[1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_most_probable_tokens_and_the_rest_are_a_divergence_of_their_own(name):
    """The others are one outcome more: a loop over K + 1 of them; exact where only one is left out, and never above the whole one."""
    pairs = zip((STUDENT / 2).softmax(-1), (TEACHER / 2).softmax(-1), top_of(TEACHER, 3).ids_NK)
    expected = 0.0
    for i, (s, t, ids) in enumerate(pairs):
        outcomes = [[float(p[j]) for j in ids.tolist()] + [1 - float(p[ids].sum())] for p in (s, t)]
        expected += 4 * LOOPS[name](*outcomes) if TARGETS[i] >= 0 else 0.0
    total, count = top_distillation_loss(STUDENT, top_of(TEACHER, 3, 2.0), TARGETS, name=name, temperature=2.0)
    assert count == 3 and float(total) == pytest.approx(expected, rel=1e-12)
    whole = distillation_loss(STUDENT, TEACHER, TARGETS, name=name, share=0.3)[0]
    torch.testing.assert_close(top_distillation_loss(STUDENT, top_of(TEACHER, 6), TARGETS, name=name, share=0.3)[0], whole)
    sizes = [float(top_distillation_loss(STUDENT, top_of(TEACHER, k), TARGETS, name=name)[0]) for k in range(1, 7)]
    assert sizes == sorted(sizes)
    assert torch.autograd.gradcheck(
        lambda x: top_distillation_loss(x, top_of(TEACHER, 3), TARGETS, name=name)[0], [STUDENT.clone().requires_grad_()]
    )


def test_without_the_rest_the_sum_is_over_the_most_probable_alone():
    """verl's forward KL of the top k: the teacher's probabilities as they are, not scaled up."""
    top, logs = top_of(TEACHER, 3), STUDENT.log_softmax(-1)
    expected = sum(
        math.exp(p) * (p - float(logs[i, j]))
        for i in range(5)
        if TARGETS[i] >= 0
        for p, j in zip(top.log_probs_NK[i].tolist(), top.ids_NK[i].tolist())
    )
    assert float(top_distillation_loss(STUDENT, top, TARGETS, tail="drop")[0]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="tail=drop leaves a sum that is a divergence for forward_kl alone, not for 'jsd'"):
        top_distillation_loss(STUDENT, top, TARGETS, name="jsd", tail="drop")


def test_chunks_of_a_teachers_file_change_nothing():
    hidden, weight, top = random(5, 4, seed=5), random(7, 4, seed=3), top_of(TEACHER, 3)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, count, measures = chunked_distillation_loss(Head(h, w), top, TARGETS, rows=2, share=0.5)
    whole = top_distillation_loss((hidden @ weight.T).requires_grad_(), top, TARGETS, share=0.5)[0]
    torch.testing.assert_close(total, whole)
    plain = hidden.clone().requires_grad_()
    top_distillation_loss(plain @ weight.T, top, TARGETS, share=0.5)[0].backward()
    torch.testing.assert_close(torch.autograd.grad(total, h)[0], plain.grad)
    counted = TARGETS >= 0
    assert count == 3 and float(measures["teacher_rest"]) == pytest.approx(float(top.rest_N.exp()[counted].sum()))
    surprise = torch.nn.functional.cross_entropy(TEACHER[counted], TARGETS[counted], reduction="sum")
    assert float(measures["teacher_cross_entropy_nats"]) == pytest.approx(float(surprise)) and "long_term_nats" not in measures


def test_what_follows_a_token_by_hand():
    student, teacher, mask = torch.zeros(1, 5), torch.tensor([[9.0, 1.0, 2.0, 4.0, 9.0]]), torch.tensor([[0, 1, 1, 1, 0]])
    assert later_returns(student, teacher, mask, normalised=False).tolist() == [[0, 6, 4, 0, 0]]
    assert later_returns(student, teacher, mask).tolist() == [[0, 3, 4, 0, 0]]


def test_one_step_and_what_follows_are_the_gradient_of_the_kl_of_whole_answers():
    """MiniLLM's decomposition against the gradient of KL(student ‖ teacher) over all 27 answers, each step after its own past."""
    own, other = (random(13, 3, seed=seed) for seed in (7, 8))  # a row of logits for each past of fewer than three tokens
    answers = list(itertools.product(range(3), repeat=3))

    def places(answer):  # 0; 1 to 3; 4 to 12
        return [0, 1 + answer[0], 4 + 3 * answer[0] + answer[1]]

    def log_probs(logits, answer):
        return logits.log_softmax(-1)[places(answer), list(answer)]

    exact = own.clone().requires_grad_()
    sum(log_probs(exact, y).sum().exp() * (log_probs(exact, y) - log_probs(other, y)).sum() for y in answers).backward()
    found = own.clone().requires_grad_()
    one_step = own.clone().requires_grad_()
    for y in answers:
        targets = torch.tensor(y)
        returns = later_returns(log_probs(own, y)[None], log_probs(other, y)[None], torch.ones(1, 3), normalised=False)[0]
        chance = float(log_probs(own, y).sum().exp())
        weight = torch.eye(3, dtype=torch.float64)  # the logits themselves, through the chunks
        heads = Head(found[places(y)], weight), Head(other[places(y)], weight)
        total, _, measures = chunked_distillation_loss(*heads, targets, returns_N=returns, rows=2, name="reverse_kl")
        (chance * total).backward()
        (chance * distillation_loss(one_step[places(y)], other[places(y)], targets, name="reverse_kl")[0]).backward()
        assert float(measures["long_term_nats"]) == pytest.approx(float((-returns * log_probs(own, y)).sum()))
    torch.testing.assert_close(found.grad, exact.grad)
    assert not torch.allclose(one_step.grad, exact.grad, atol=1e-2)


def test_options_are_checked():
    for options, text in (({"name": "kl"}, "is not one of forward_kl"), ({"name": "jsd", "beta": 2.0}, r"beta=2.0 is not in \[0, 1\]")):
        with pytest.raises(UserError, match=text):
            distillation_loss(STUDENT, TEACHER, TARGETS, **options)
    with pytest.raises(UserError, match="temperature=0 must be positive"):
        divergence("jsd", STUDENT, TEACHER, temperature=0)
