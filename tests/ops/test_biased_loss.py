"""The head's loss with a bias is PyTorch's, in value and in gradients."""

import pytest
import torch
import torch.nn.functional as F

from plinth.ops.linear import collect_gradients
from plinth.ops.loss import biased_cross_entropy


@pytest.mark.parametrize("width", [7, 31, 32])
def test_it_is_pytorchs_cross_entropy(width):
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, width), (20, width), (20,))
    hidden, weight, bias = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    targets = torch.randint(20, (12,), generator=generator)
    targets[3] = -1
    mine = biased_cross_entropy(hidden, weight, bias, targets)
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, [hidden, weight, bias]), torch.autograd.grad(theirs, [hidden, weight, bias])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_its_weight_learns_in_a_step_that_collects_gradients(dtype, tolerance):
    """The matrix that the loss reads is computed from weight and bias, whole blocks of 32 that kernels take: they get their gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((32, 64), (96, 64), (96,))
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(96, (32,), generator=generator)
    with collect_gradients():
        mine = torch.autograd.grad(biased_cross_entropy(*leaves, targets), leaves)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    loss = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    for a, b in zip(mine, torch.autograd.grad(loss, exact)):
        assert (a.float() - b).norm() < tolerance * b.norm()
