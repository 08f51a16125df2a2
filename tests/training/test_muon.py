"""Muon against torch.optim.Muon, a singular value decomposition, and the numbers of the papers."""

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.kernels import library, why_not
from plinth.training.muon import NEWTON_SCHULZ, orthogonalise, polar_express, quintics, update_on_kernels
from plinth.training.optim import OptimizerConfig, build_optimizer, decay_weights, normalise_neurons
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers

CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48, max_seq_len=16
)


def make_masters(dtype=torch.float32):
    return MasterWeights(Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0)), dtype)


def run(config, masters, steps=3, threads=2):
    """Give the optimizer `steps` seeded gradients; yields them before each update."""
    optimizer = build_optimizer(masters, config)
    with open_workers(threads) as workers:
        for seed in range(steps):
            generator = torch.Generator().manual_seed(seed)
            grads = {n: torch.randn(t.shape, generator=generator) for n, t in masters.tensors.items()}
            yield {n: g.clone() for n, g in grads.items()}
            optimizer.step(grads, 1.0, workers)


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "rows"), [("mlp.down", (0, 32)), ("mlp.gate_up", (48, 96)), ("attention.qkv", (32, 48))])
def test_muon_equals_torch_optim_on_every_projection(name, rows):
    masters = make_masters()
    name, (a, b) = f"layers.1.{name}.weight", rows
    start = masters.tensors[name][a:b].clone()
    twin = start.clone().requires_grad_()
    oracle = torch.optim.Muon([twin], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original")
    for grads in run(OptimizerConfig(name="muon", muon_lr=0.02, weight_decay=0.1, momentum=0.95, newton_schulz_steps=5), masters):
        twin.grad = grads[name][a:b]
        oracle.step()
    moved, expected = masters.tensors[name][a:b], twin.detach()
    assert (moved - expected).norm() < 0.02 * (expected - start).norm()  # torch's Newton-Schulz runs in bf16


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (3, 24, 24)])
@pytest.mark.parametrize("name", ["newton-schulz", "polar-express"])
def test_orthogonalise_is_the_polynomial_of_the_singular_values(shape, name):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices, quintics(name, 5), torch.float32)
    u, s, vh = torch.linalg.svd(matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True), full_matrices=False)
    for a, b, c in quintics(name, 5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(found.double(), u * s[:, None] @ vh, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["newton-schulz", "polar-express"])
def test_singular_values_move_towards_one(dtype, name):
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices, quintics(name, 5), dtype).float())
    assert values.min() > 0.6 and values.max() < 1.4


def test_polar_express_is_the_published_sequence():
    # arXiv:2505.16932, listing 1, whose list is divided by powers of the safety factor 1.01 but for the last polynomial
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845749518, 0.4188073119525673),
    ]
    for i, (ours, theirs) in enumerate(zip(polar_express(5), published)):
        safety = 1.01 if i < 4 else 1.0
        expected = [value / safety**power for value, power in zip(theirs, (1, 3, 5))]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-6, atol=0)


def test_each_polynomial_alternates_between_its_extremes():
    a, b, c = polar_express(1)[0]
    x = torch.linspace(0.0240728, 1.0, 20001, dtype=torch.float64)
    deviation = (a * x + b * x**3 + c * x**5) / (a + b + c)  # undo the recentring by the value at 1
    extremes = deviation[[0, -1]].tolist() + [deviation.max().item(), deviation.min().item()]
    spread = max(extremes) - min(extremes)
    assert min(abs(deviation[0] - deviation.min()), abs(deviation[0] - deviation.max())) < 1e-3 * spread


def test_cautious_decay_spares_what_the_update_lets_grow():
    weight = torch.tensor([1.0, -1.0, 2.0, -2.0])
    update = torch.tensor([1.0, 1.0, -1.0, -1.0])  # subtracted: the first and the last weight shrink
    decay_weights([weight], [update], 0.1, cautious=True)
    torch.testing.assert_close(weight, torch.tensor([0.9, -1.0, 2.0, -1.8]))
    decay_weights([weight], [update], 0.5, cautious=False)
    torch.testing.assert_close(weight, torch.tensor([0.45, -0.5, 1.0, -0.9]))


def test_normuon_gives_every_neuron_the_same_size_and_keeps_the_norm():
    update = torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).sign()
    row_square = torch.zeros(3, 1)
    normed = update.clone()
    normalise_neurons(normed, row_square, beta2=0.9)
    torch.testing.assert_close(row_square[:, 0], 0.1 * torch.tensor([16.0, 4.0, 1.0]))
    torch.testing.assert_close(normed.norm(dim=1), torch.full((3,), (update.norm() / 3**0.5).item()))


@pytest.mark.parametrize("options", [{"cautious_decay": True}, {"normuon_beta2": 0.95}, {"polynomials": "polar-express"}])
def test_options_of_muon_change_the_update_and_threads_do_not(options):
    plain, changed, twin = make_masters(), make_masters(), make_masters()
    for _ in run(OptimizerConfig(name="muon"), plain):
        pass
    for _ in run(OptimizerConfig(name="muon", **options), changed):
        pass
    for _ in run(OptimizerConfig(name="muon", **options), twin, threads=1):
        pass
    name = "layers.1.mlp.gate_up.weight"
    assert not torch.equal(plain.tensors[name], changed.tensors[name])
    for name in changed.names:
        torch.testing.assert_close(changed.tensors[name], twin.tensors[name], rtol=1e-4, atol=1e-5)


def test_the_momentum_rises_to_its_value():
    config = OptimizerConfig(momentum=0.95, momentum_warmup_steps=10)
    values = [config.momentum_at(update) for update in range(1, 13)]
    assert values == sorted(values) and values[0] == pytest.approx(0.86) and values[9:] == [0.95] * 3
    assert OptimizerConfig(momentum=0.95).momentum_at(1) == 0.95


@pytest.mark.parametrize(("options", "text"), [({"newton_schulz_steps": 0}, "between 1 and 10"), ({"normuon_beta2": 1.0}, r"\[0, 1\)")])
def test_impossible_options_are_named(options, text):
    with pytest.raises(UserError, match=text):
        OptimizerConfig(**options)


def test_newton_schulz_is_the_published_polynomial():
    assert NEWTON_SCHULZ == (3.4445, -4.7750, 2.0315) and quintics("newton-schulz", 2) == (NEWTON_SCHULZ,) * 2


def test_the_batch_decides_where_no_optimizer_is_named():
    assert OptimizerConfig().resolved(128, 4096).name == "muon"
    assert OptimizerConfig().resolved(384, 4096).name == "muon"  # 0.469
    assert OptimizerConfig().resolved(400, 4096).name == "adamw"
    assert OptimizerConfig().resolved().name == "muon"
    assert OptimizerConfig(name="muon").resolved(4096, 1024).name == "muon"


@pytest.mark.skipif(library() is None, reason=f"no kernels of ours here: {why_not()}")
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 96), (1, 96, 64), (1, 256, 256), (1, 672, 256), (2, 128, 320)])
@pytest.mark.parametrize("name", ["newton-schulz", "polar-express"])
def test_the_kernel_follows_the_iterations_in_float64(shape, name):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = orthogonalise(matrices, quintics(name, 5), torch.bfloat16)
    exact = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for a, b, c in quintics(name, 5):
        gram = exact @ exact.transpose(1, 2)
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.skipif(library() is None, reason=f"no kernels of ours here: {why_not()}")
@pytest.mark.parametrize("shape", [(64, 96), (96, 32)])
def test_the_kernels_move_momentum_and_weights_as_published(shape):
    generator = torch.Generator().manual_seed(0)
    weight, buffer = torch.randn(shape, generator=generator), torch.zeros(shape)
    twin = weight.clone().requires_grad_()
    oracle = torch.optim.Muon([twin], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original")
    start = weight.clone()
    for _ in range(4):
        grad = torch.randn(shape, generator=generator)
        rate = 0.02 * max(1.0, shape[0] / shape[1]) ** 0.5
        update_on_kernels(weight, grad, buffer, quintics("newton-schulz", 5), momentum=0.95, keep=1 - 0.02 * 0.1, rate=rate)
        twin.grad = grad
        oracle.step()
    torch.testing.assert_close(buffer, oracle.state[twin]["momentum_buffer"], rtol=1e-5, atol=1e-6)
    assert (weight - twin.detach()).norm() < 0.02 * (twin.detach() - start).norm()  # torch's Newton-Schulz rounds more in bf16
