"""Laws of the training step: splits do not matter, nothing non-finite passes, the updates are the published ones."""

import pytest
import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.linear import collect_gradients, embedding
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import NonFiniteError, batch_tokens, open_workers, share_out, split_gradients, train_step

CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48, max_seq_len=16
)


def make_masters(dtype=torch.float32):
    model = Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))
    for i, layer in enumerate(model.layers):  # the zero projections would hide half of the gradients
        for weight in (layer.attention.out.weight, layer.mlp.down.weight):
            torch.nn.init.normal_(weight, 0, 0.1, generator=torch.Generator().manual_seed(i))
    return MasterWeights(model, dtype)


def make_rows(rows=6, seed=1):
    tokens = torch.randint(CONFIG.vocab_size, (rows, 13), generator=torch.Generator().manual_seed(seed))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -1
    return inputs, targets


@pytest.mark.parametrize("sizes", [[1, 5], [2, 2, 2], [1, 1, 1, 3], [6]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernels_and_autograd_add_up_to_one_gradient(sizes, threads):
    """In bf16 whole blocks of 32 rows go through kernels that collect their sums, others through autograd."""
    tokens = torch.randint(CONFIG.vocab_size, (6, 17), generator=torch.Generator().manual_seed(1))
    rows = tokens[:, :16].contiguous(), tokens[:, 1:].contiguous()
    with open_workers(threads) as workers:
        exact = split_gradients(make_masters(), causal_lm_loss, [rows], workers)
        parts = list(zip(*(t.split(sizes) for t in rows)))
        rounded = split_gradients(make_masters(torch.bfloat16), causal_lm_loss, parts, workers)
    assert rounded[1] == exact[1] == 96
    assert rounded[0] == pytest.approx(float(exact[0]), rel=0.01)
    for a, b in zip(rounded[3], exact[3]):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("sizes", [[1, 5], [2, 2, 2], [1, 1, 1, 3], [6]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_split_of_a_batch_gives_the_same_gradient(sizes, threads):
    inputs, targets = make_rows()
    masters = make_masters()
    with open_workers(threads) as workers:
        whole = split_gradients(masters, causal_lm_loss, [(inputs, targets)], workers)
        parts = list(zip(inputs.split(sizes), targets.split(sizes)))
        split = split_gradients(masters, causal_lm_loss, parts, workers)
    assert whole[1] == split[1] == int((targets >= 0).sum())
    assert abs(whole[0] - split[0]) < 1e-3
    for a, b in zip(whole[3], split[3]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_uncounted_targets_change_nothing():
    inputs, targets = make_rows()
    loss, count, _ = causal_lm_loss(make_masters().model, (inputs, targets))
    logits = make_masters().model.logits(make_masters().model(inputs))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert count == int((targets >= 0).sum())


def test_the_dynamic_loss_weighs_each_token_by_its_probability():
    inputs, targets = make_rows()
    model = make_masters().model
    loss, count, metrics = causal_lm_loss(model, (inputs, targets), dynamic=True)
    log_probs = torch.log_softmax(model.logits(model(inputs)).float(), -1).gather(2, targets.clamp_min(0)[..., None])[..., 0]
    weights = log_probs.detach().exp() * (targets >= 0)
    torch.testing.assert_close(loss, -(weights * log_probs).sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(metrics["nll_nats"], causal_lm_loss(model, (inputs, targets))[0].detach(), rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(*(torch.autograd.grad(each, list(model.parameters())) for each in (loss, -(weights * log_probs).sum()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert count == int((targets >= 0).sum())


def test_a_batch_without_a_supervised_token_is_an_error():
    masters = make_masters()
    optimizer = build_optimizer(masters, OptimizerConfig())
    inputs, targets = make_rows()
    with open_workers(1) as workers, pytest.raises(ValueError, match="no supervised token"):
        train_step(masters, causal_lm_loss, [(inputs, torch.full_like(targets, -1))], optimizer, workers)


def test_a_non_finite_gradient_stops_before_the_update():
    masters = make_masters()
    before = {name: tensor.clone() for name, tensor in masters.tensors.items()}
    optimizer = build_optimizer(masters, OptimizerConfig())

    def poisoned(model, batch):
        loss, count, metrics = causal_lm_loss(model, batch)
        return loss * float("nan"), count, metrics

    with open_workers(1) as workers, pytest.raises(NonFiniteError):
        train_step(masters, poisoned, [make_rows()], optimizer, workers)
    assert all(torch.equal(before[name], tensor) for name, tensor in masters.tensors.items())


@pytest.mark.oracle
def test_adamw_equals_torch_optim():
    masters = make_masters()
    config = OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.0, eps=1e-8, beta1=0.9, beta2=0.95)
    optimizer = build_optimizer(masters, config)
    twins = {name: tensor.clone().requires_grad_() for name, tensor in masters.tensors.items()}
    oracle = torch.optim.AdamW(twins.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    with open_workers(2) as workers:
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            grads = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in twins.items()}
            for name, twin in twins.items():
                twin.grad = grads[name].clone()
            oracle.step()
            optimizer.step(grads, 1.0, workers)
    for name, twin in twins.items():
        torch.testing.assert_close(masters.tensors[name], twin.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_small_batch_is_learnt_by_heart(name):
    masters = make_masters()
    optimizer = build_optimizer(masters, OptimizerConfig(name=name, lr=0.01, muon_lr=0.02, weight_decay=0.0))
    batch = [make_rows(rows=2)]
    with open_workers(2) as workers:
        losses = [train_step(masters, causal_lm_loss, batch, optimizer, workers).loss_nats for _ in range(60)]
    assert losses[0] > 3.5 and losses[-1] < 0.1


class Shared(torch.nn.Module):
    """Gradients as autograd may give them: one tensor for two parameters, a slice of a matrix for a third, a turned one for a fourth."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"one": (6,), "two": (6,), "beside": (5, 6), "turned": (6, 5)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape, generator=draw)))

    def matrix_parts(self):
        return {}


def shared_loss(model, batch):
    wide = torch.cat([model.beside, (model.one + model.two)[:5, None]], 1)
    return (wide @ batch).square().sum() + (model.turned.t() @ batch[:6]).pow(3).sum(), len(batch), {}


def test_gradients_that_share_memory_or_lie_in_another_order_update_as_in_pytorch():
    batch = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    reference, model = Shared(), Shared()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    masters = MasterWeights(model, torch.float32)
    ours = build_optimizer(masters, OptimizerConfig(name="adamw", lr=0.01, eps=1e-8, weight_decay=0.0))
    with open_workers(1) as workers:
        for _ in range(3):
            optimizer.zero_grad()
            (shared_loss(reference, batch)[0] / 7).backward()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
            result = train_step(masters, shared_loss, [batch], ours, workers)
            assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(masters.tensors[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_threads_get_about_as_many_tokens_each():
    sizes = [3, 40, 5, 17, 30, 5, 8, 12]
    batches = [(torch.zeros(size, 2), size) for size in sizes]
    shares = share_out(batches, 2)
    assert sorted(size for share in shares for _, size in share) == sorted(sizes)
    assert [sum(size for _, size in share) for share in shares] == [60, 60]
    alike = [(torch.zeros(4, 2), i) for i in range(5)]
    assert [[i for _, i in share] for share in share_out(alike, 2)] == [[0, 1], [2, 3, 4]]  # in their order
    assert share_out([1, 2, 3], 3) == [[1], [2], [3]]  # of a size that is not known
    named = [{"mask": torch.ones(2, n), "prompts": torch.ones(2, 3), "completions": torch.ones(2, n)} for n in (1, 2, 5, 8)]
    texts = [{"inputs": torch.ones(3, 2), "targets": torch.ones(3, 2), "weight": torch.ones(())}]
    assert [[batch_tokens(batch) for batch in share] for share in share_out(named + texts, 2)] == [[8, 22], [10, 16, 6]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_of_rows_gets_the_gradient_of_the_whole_table(dtype):
    weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    tokens = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(1))
    factors = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(2))
    with collect_gradients() as collected:
        for part in range(3):
            loss = (embedding(tokens[part], weight).float() * factors[part]).sum()
            assert torch.autograd.grad(loss, [weight], allow_unused=True) == (None,)
    exact = weight.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad((torch.nn.functional.embedding(tokens, exact) * factors).sum(), [exact])
    (found,) = collected.filled_plain(weight)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
