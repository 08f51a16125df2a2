"""Training on a GPU: near the CPU's numbers, the same bits when asked for, and runs that move between the two."""

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.chunked_loss import chunked_cross_entropy
from plinth.ops.loss import linear_cross_entropy
from plinth.run import Run, describe_hardware
from plinth.training.checkpoint import list_checkpoints
from plinth.training.device import device_settings
from plinth.training.graphs import MOST_SHAPES, GraphedGradients
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers, train_step
from plinth.training.throughput import measure_tokens_per_s

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")]

CONFIG = DecoderConfig(
    vocab_size=128, hidden_size=128, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=64, intermediate_size=256, max_seq_len=128
)
STEPS = 8


class Killed(BaseException):
    """Stands for a power cut."""


def batches_at(step):
    tokens = torch.randint(128, (8, 65), generator=torch.Generator().manual_seed(step % 3))
    return [(tokens[i : i + 4, :-1], tokens[i : i + 4, 1:]) for i in (0, 4)]


def run_training(path, device, *, resume=False, kill_at=None, **changes):
    def batches(step):
        if step == kill_at:
            raise Killed
        return batches_at(step)

    run = Run.open(path) if resume else Run.create(path, "pretrain", {})
    model = Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))
    options = {"dtype": "float32", "checkpoint_every_s": 0.0, "keep_checkpoints": 99, **changes}
    config = TrainConfig(steps=STEPS, warmup_steps=2, device=device, **options).resolved()
    summary = train(run, model, causal_lm_loss, batches, config, description="test", resume=resume)
    return run, model.state_dict(), summary


def losses(run):
    return torch.tensor([record["loss_nats"] for record in run.metrics()])


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("options", [{}, {"compile": True}, {"cuda_graphs": True}, {"compile": True, "cuda_graphs": True}])
def test_the_loss_curve_is_the_cpus(tmp_path, dtype, tolerance, options):
    on_cpu, _, _ = run_training(tmp_path / "cpu", "cpu", dtype=dtype)
    on_gpu, weights, summary = run_training(tmp_path / "gpu", "cuda", dtype=dtype, **options)
    assert (losses(on_gpu) - losses(on_cpu)).abs().max() < tolerance
    assert losses(on_gpu)[-1] < losses(on_gpu)[0] - 0.1
    assert {w.device.type for w in weights.values()} == {"cpu"} and {w.dtype for w in weights.values()} == {torch.float32}
    assert 1e6 < summary["peak_memory_bytes"] < 8e9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_equals_never_stopped_in_deterministic_mode(tmp_path, dtype):
    options = {"dtype": dtype, "deterministic": True}
    whole_run, whole, _ = run_training(tmp_path / "whole", "cuda", **options)
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", "cuda", kill_at=5, **options)
    run, resumed, _ = run_training(tmp_path / "cut", "cuda", resume=True, **options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.equal(losses(run), losses(whole_run))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("first, second", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_device(tmp_path, first, second):
    whole, _, _ = run_training(tmp_path / "whole", "cpu")
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", first, kill_at=4)
    assert len(list_checkpoints(Run(tmp_path / "cut"))) == 4
    run, _, _ = run_training(tmp_path / "cut", second, resume=True)
    assert (losses(run) - losses(whole)).abs().max() < 2e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_compiled_loss_equals_the_cpus(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (700, 1000))
    targets = torch.randint(-1, 1000, (700,), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
        args = *leaves, targets.to(device)
        loss = linear_cross_entropy(*args) if device == "cpu" else chunked_cross_entropy(*args, 200 * 1000)
        results.append([loss.cpu(), *(grad.cpu() for grad in torch.autograd.grad(loss, leaves))])
    for a, b in zip(*results):
        assert (a.float() - b.float()).norm() / a.float().norm() < tolerance


def test_a_step_waits_for_the_gpu_once():
    masters = MasterWeights(Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0)), torch.bfloat16, "cuda")
    optimizer = build_optimizer(masters, OptimizerConfig())
    with open_workers(1, "cuda") as worker:
        train_step(masters, causal_lm_loss, batches_at(0), optimizer, worker)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
            train_step(masters, causal_lm_loss, batches_at(1), optimizer, worker)
    events = {event.key: event.count for event in profile.key_averages()}
    assert events.get("aten::_local_scalar_dense", 0) == 0  # .item(); the one look is a copy of a few numbers
    assert sum(events.get(name, 0) for name in ("Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH (Device -> Pinned)")) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_give_the_bits_of_single_launches(tmp_path, dtype):
    options = {"dtype": dtype, "deterministic": True}
    plain, weights, _ = run_training(tmp_path / "plain", "cuda", **options)
    graphed, same, _ = run_training(tmp_path / "graphed", "cuda", cuda_graphs=True, **options)
    assert torch.equal(losses(plain), losses(graphed))
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_too_many_shapes_for_graphs_are_an_error():
    masters = MasterWeights(Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0)), torch.bfloat16, "cuda")
    gradients = GraphedGradients()
    rows = [torch.zeros(1, 8 + n, dtype=torch.int64) for n in range(MOST_SHAPES + 1)]
    for row in rows[:-1]:
        gradients(masters, causal_lm_loss, (row, row))
    with pytest.raises(UserError, match=f"more than {MOST_SHAPES} shapes"):
        gradients(masters, causal_lm_loss, (rows[-1], rows[-1]))


def test_tf32_is_as_asked_and_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    for wanted in (True, False):
        with device_settings("cuda", tf32=wanted):
            assert torch.backends.cuda.matmul.allow_tf32 is wanted
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_speed_and_hardware_name_the_gpu():
    sample = measure_tokens_per_s(CONFIG, micro_batch_size=4, seq_len=64, device="cuda", compiled=True)
    assert sample.tokens_per_s > 0 and sample.peak_memory_bytes > 1e6
    assert describe_hardware()["gpus"][0]["name"] == torch.cuda.get_device_name(0)
