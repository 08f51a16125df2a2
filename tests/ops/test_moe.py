"""Mixtures of experts: grouped products against the definition, choices and losses by hand."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from plinth.ops.moe import (
    expert_shares,
    gated_experts,
    gated_experts_rows,
    group,
    load_balance_loss,
    load_entropy,
    looped_experts,
    route,
    router_z_loss,
)

D, F, X = 32, 48, 5


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(dtype=torch.float32):
    return draw(X * 2 * F, D, seed=1, dtype=dtype) * D**-0.5, draw(X * D, F, seed=2, dtype=dtype) * F**-0.5


def gradients(function, x, logits, gate_up, down, num_active):
    inputs = [t.clone().requires_grad_() for t in (x, logits, gate_up, down)]
    y = function(inputs[0], route(inputs[1], num_active), *inputs[2:])
    total = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    return [y, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens, num_active", [(37, 2), (1, 2), (8, 1), (64, X)])
def test_grouped_experts_equal_the_loop(num_tokens, num_active, dtype, tolerance):
    inputs = draw(num_tokens, D, dtype=dtype), draw(num_tokens, X, seed=3, dtype=dtype), *weights(dtype)
    for fast, slow in zip(gradients(gated_experts, *inputs, num_active), gradients(looped_experts, *inputs, num_active)):
        # with one choice, renormalised, the router has no gradient but rounding
        assert (fast.float() - slow.float()).norm() <= tolerance * slow.float().norm() + 1e-3 * tolerance


def test_expert_without_a_token_has_no_gradient():
    logits = torch.full((6, X), -5.0)
    logits[:, 3] = 5.0
    grads = gradients(gated_experts, draw(6, D), logits, *weights(), 1)
    per_expert = grads[3].view(X, -1).norm(dim=1)
    assert per_expert[3] > 0
    assert per_expert.sum() == per_expert[3]


def test_rows_equal_the_grouped_product_and_do_not_depend_on_their_company():
    x, logits = draw(48, D), draw(48, X, seed=3)
    together = gated_experts_rows(x, route(logits, 2), *weights())
    torch.testing.assert_close(together, gated_experts(x, route(logits, 2), *weights()), rtol=1e-5, atol=1e-5)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:16]
    assert torch.equal(gated_experts_rows(x[order], route(logits[order], 2), *weights()), together[order])


def test_groups_by_hand():
    experts_NC = torch.tensor([[2, 0], [0, 2], [2, 1]])
    groups = group(experts_NC, 4)
    assert groups.source_M.tolist() == [0, 1, 2, 0, 1, 2]
    assert groups.bounds() == [(0, 2), (2, 3), (3, 6), (6, 6)]
    assert groups.place_NC.tolist() == [[3, 0], [1, 4], [5, 2]]
    tiled = group(experts_NC, 4, tile=4)
    assert tiled.bounds() == [(0, 4), (4, 8), (8, 12), (12, 12)]
    assert tiled.place_NC.tolist() == [[8, 0], [1, 9], [10, 4]]
    assert tiled.source_M[tiled.place_NC].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_weights_are_probabilities_of_the_chosen():
    logits = torch.log(torch.tensor([[0.5, 0.1, 0.3, 0.1]]))
    routing = route(logits, 2, renormalise=False)
    assert routing.experts_NC.tolist() == [[0, 2]]
    torch.testing.assert_close(routing.weights_NC, torch.tensor([[0.5, 0.3]]))
    torch.testing.assert_close(route(logits, 2).weights_NC, torch.tensor([[0.625, 0.375]]))


def test_losses_by_hand():
    routing = route(torch.log(torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])), 1)
    shares = expert_shares(routing)
    assert shares.tolist() == [0.75, 0.25]
    assert load_balance_loss(routing).item() == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))
    assert router_z_loss(routing).item() == pytest.approx(0.0, abs=1e-12)  # logs of probabilities: their logsumexp is 0
    assert load_entropy(shares).item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2))
    shifted = route(routing.logits_NX + 3.0, 1)
    assert router_z_loss(shifted).item() == pytest.approx(9.0, rel=1e-5)


def test_positions_that_do_not_count_change_no_loss():
    logits = draw(20, X)
    counted = torch.arange(20) < 13
    whole, part = route(logits, 2), route(logits[:13], 2)
    for loss in (load_balance_loss, router_z_loss, expert_shares):
        torch.testing.assert_close(loss(whole, counted), loss(part))


def test_load_balance_equals_transformers_for_one_layer():
    logits = draw(64, X, seed=5)
    theirs = load_balancing_loss_func((logits,), X, 2)
    assert load_balance_loss(route(logits, 2)).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_even_load_is_the_least_loss():
    even = route(torch.eye(4) * 1e-4, 1)
    uneven = route(torch.eye(4)[:1].expand(4, 4), 1)
    assert load_balance_loss(even).item() == pytest.approx(1.0, rel=1e-3)
    assert load_entropy(expert_shares(even)).item() == pytest.approx(1.0)
    assert load_balance_loss(uneven) > 1.0
    assert load_entropy(expert_shares(uneven)).item() == 0.0
