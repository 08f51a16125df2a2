"""The loss under capped logits against its plain twin."""

import pytest
import torch
import torch.nn.functional as F

from plinth.ops.loss import linear_cross_entropy, token_log_probs
from plinth.ops.softcap import softcap, softcapped_cross_entropy

CAP = 3.0


def numbers(rows=300, vocab=211, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 32, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::7] = -1
    return hidden, weight, targets


def plain(hidden, weight, targets):
    logits = CAP * torch.tanh((hidden @ weight.T).float() / CAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def test_scores_stay_within_the_cap_and_small_ones_stay():
    scores = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6])
    torch.testing.assert_close(softcap(scores, 15.0), torch.tensor([-15.0, -0.01, 0.0, 0.01, 15.0]), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("elements", [1 << 21, 128 * 211], ids=["one chunk", "several chunks"])
def test_loss_and_gradients_are_those_of_the_plain_twin(elements):
    hidden, weight, targets = numbers()
    expected = plain(hidden, weight, targets)
    gradients = torch.autograd.grad(3.0 * expected, (hidden, weight))
    loss = softcapped_cross_entropy(hidden, weight, targets, CAP, elements)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(torch.autograd.grad(3.0 * loss, (hidden, weight)), gradients):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_bf16_gives_the_plain_twin_within_its_rounding():
    hidden, weight, targets = numbers(rows=256, vocab=256, dtype=torch.bfloat16)  # a shape that our kernels would take
    loss = linear_cross_entropy(hidden, weight, targets, CAP)
    expected = plain(hidden.float(), weight.float(), targets)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0.0)
    found = torch.autograd.grad(loss, hidden)[0].float()
    wanted = torch.autograd.grad(expected, hidden)[0].float()
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_log_probabilities_sum_to_the_loss():
    hidden, weight, targets = numbers()
    torch.testing.assert_close(-token_log_probs(hidden, weight, targets, CAP).sum(), plain(hidden, weight, targets))
