"""What experts add to a loss: by hand, over splits of a batch, and what training with it does."""

from dataclasses import replace

import pytest
import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.moe import expert_shares, load_balance_loss, load_entropy, router_z_loss
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers, train_step

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, max_seq_len=64,
    num_experts=4, num_active_experts=2, expert_intermediate_size=32,
)  # fmt: skip


def make_model(config=CONFIG, seed=0):
    return Transformer(config).init_weights(torch.Generator().manual_seed(seed))


def batch(rows=4, length=16, seed=7):
    x = torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return x, x.roll(-1, 1)


def test_the_loss_is_that_of_the_tokens_and_of_every_router():
    model, (x, targets) = make_model(), batch()
    loss, count, metrics = causal_lm_loss(model, (x, targets))
    plain, _, _ = causal_lm_loss(make_model(replace(CONFIG, router_aux_loss=0.0, router_z_loss=0.0)), (x, targets))
    routings = []
    with torch.no_grad():
        model(x, routings=routings)
    assert len(routings) == 2
    balance = sum(load_balance_loss(r) for r in routings) / 2
    z = sum(router_z_loss(r) for r in routings) / 2
    torch.testing.assert_close(loss, plain + count * (0.01 * balance + 0.001 * z))
    torch.testing.assert_close(float(metrics["text_loss_nats"]), float(plain.detach()), rtol=1e-6, atol=1e-4)
    assert float(metrics["router_balance"] / count) == pytest.approx(float(balance) / 2)
    assert float(metrics["load_entropy"] / count) == pytest.approx(sum(float(load_entropy(expert_shares(r))) for r in routings) / 2)
    assert 1.0 <= float(metrics["max_load"] / count) <= 4.0


def test_padding_moves_neither_loss_nor_gradient():
    model, (x, targets) = make_model(), batch()
    padded = torch.cat([x, torch.zeros_like(x)], 1), torch.cat([targets, torch.full_like(targets, -1)], 1)
    results = []
    for each in ((x, targets), padded):
        loss, count, metrics = causal_lm_loss(model, each)
        results.append((loss, count, metrics, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    (loss, count, metrics, grads), (padded_loss, padded_count, padded_metrics, padded_grads) = results
    assert count == padded_count
    torch.testing.assert_close(loss, padded_loss, rtol=1e-5, atol=1e-4)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(padded_metrics[name]), rel=1e-4), name
    for grad, other in zip(grads, padded_grads):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)


def test_without_balance_any_split_of_a_batch_gives_the_same_gradient():
    model, (x, targets) = make_model(replace(CONFIG, router_aux_loss=0.0, router_z_loss=0.1)), batch()
    targets[0, 3:] = -1  # so that the parts count differently many
    whole = torch.autograd.grad(causal_lm_loss(model, (x, targets))[0], list(model.parameters()))
    parts = [torch.autograd.grad(causal_lm_loss(model, (x[i : i + 1], targets[i : i + 1]))[0], list(model.parameters())) for i in range(4)]
    for total, pieces in zip(whole, zip(*parts)):
        torch.testing.assert_close(total, sum(pieces), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_batch_is_learnt_by_heart_and_every_weight_moves(dtype):
    model = make_model(replace(CONFIG, shared_expert_intermediate_size=24, shared_expert_gate=True, dense_layers=(0,)))
    masters = MasterWeights(model, dtype)
    optimizer = build_optimizer(masters, OptimizerConfig(lr=0.01))
    before = {name: tensor.clone() for name, tensor in masters.tensors.items()}
    x, _ = batch(rows=8)
    targets = (x + x.roll(1, 1)) % CONFIG.vocab_size  # of two tokens, so that attention is needed
    with open_workers(2) as workers:
        halves = [(x[:4], targets[:4]), (x[4:], targets[4:])]
        results = [train_step(masters, causal_lm_loss, halves, optimizer, workers, lr_scale=1.0) for _ in range(80)]
    assert results[-1].metrics["text_loss_nats"] < 0.3 * results[0].metrics["text_loss_nats"]
    assert results[-1].metrics["text_loss_nats"] < results[-1].loss_nats
    assert all(not torch.equal(tensor, before[name]) for name, tensor in masters.tensors.items())


def test_the_balance_loss_evens_out_a_router_that_prefers_one_expert():
    entropies = {}
    for coefficient in (0.0, 1.0):
        model = make_model(replace(CONFIG, num_active_experts=1, router_aux_loss=coefficient, router_z_loss=0.0))
        with torch.no_grad():  # the mean of what enters the router decides for expert 0
            for layer in model.layers:
                layer.mlp.router.weight[0] += 1.0
        masters = MasterWeights(model, torch.float32)
        optimizer = build_optimizer(masters, OptimizerConfig(name="adamw", lr=0.01))
        with open_workers(1) as workers:
            results = [train_step(masters, causal_lm_loss, [batch()], optimizer, workers, lr_scale=1.0) for _ in range(40)]
        entropies[coefficient] = results[-1].metrics["load_entropy"]
    assert entropies[1.0] > 0.95 > entropies[0.0]
