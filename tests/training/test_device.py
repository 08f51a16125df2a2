"""The step on another device than the CPU.

The meta device stands in for a GPU: its tensors have shapes, dtypes and a device but no values. So an operation that mixes
devices fails there, and so does one that would have to wait for the GPU to know a value. Values are compared on the CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.chunked_loss import SMALLEST_CHUNK, chunk_rows, chunked_cross_entropy
from plinth.training.compile import COMPILE_PAYS_STEPS, compiled_blocks
from plinth.training.device import choose_device, device_settings, move_batch
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import InlineWorker, open_workers, read_scalars, split_gradients

CONFIG = DecoderConfig(vocab_size=40, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def make_batches(rows=4):
    tokens = torch.randint(40, (rows, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -1
    return [(tokens[i : i + 2, :-1], targets[i : i + 2]) for i in range(0, rows, 2)]


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("learnable_norm", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_gradients_and_update_stay_on_the_device_and_never_wait_for_it(name, learnable_norm, segments):
    config = DecoderConfig(**{**vars(CONFIG), "learnable_norm": learnable_norm, "tie_embeddings": not learnable_norm})
    masters = MasterWeights(Transformer(config), torch.bfloat16, "meta")
    optimizer = build_optimizer(masters, OptimizerConfig(name=name))
    batches = [(*batch, torch.arange(16).expand(2, 16) // 5) if segments else batch for batch in make_batches()]
    with open_workers(3, "meta") as worker:
        loss_sum, count, _, grads = split_gradients(masters, causal_lm_loss, batches, worker)
        optimizer.step(dict(zip(masters.names, grads)), 1.0, worker)
        masters.publish()
    assert isinstance(worker, InlineWorker)
    tensors = [loss_sum, count, *grads, *masters.tensors.values(), *optimizer.state.values(), *masters.parameters]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in (*grads, *masters.tensors.values())} == {torch.float32}
    with pytest.raises(RuntimeError, match="meta"):  # the step's one look: it would have been noticed above
        read_scalars([loss_sum, count])


def test_scalars_are_read_in_order_whether_numbers_or_tensors():
    assert read_scalars([1.5, torch.tensor(2), 3, torch.tensor(0.25)]) == [1.5, 2.0, 3, 0.25]
    assert read_scalars([4.0]) == [4.0]


@pytest.mark.parametrize("elements", [1, 40 * 150, 1 << 30])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_for_gpus_equals_the_plain_one(elements, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(-1, 40, (300,), generator=generator)
    fast = chunked_cross_entropy(hidden, weight, targets, elements)
    slow = F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=0)
    for a, b in zip(torch.autograd.grad(0.5 * fast, (hidden, weight)), torch.autograd.grad(0.5 * slow, (hidden, weight))):
        assert a.dtype == dtype
        assert (a.float() - b.float()).norm() / b.float().norm() < tolerance


def test_chunks_are_halves_of_halves_and_never_tiny():
    assert chunk_rows(1 << 16, 50304) == 8192
    assert chunk_rows(100, 50304) == 100
    assert chunk_rows(1000, 1 << 40) == 125 <= SMALLEST_CHUNK


def test_compiled_layers_share_their_code_and_are_put_back():
    counter = CompileCounterWithBackend("aot_eager")
    model = Transformer(CONFIG).to("meta")
    parameters = list(model.parameters())

    def gradients():
        for batch in make_batches():
            loss, *_ = causal_lm_loss(model, move_batch(batch, "meta"))
            yield from torch.autograd.grad(loss, parameters)

    with compiled_blocks(model, backend=counter):
        shapes = [grad.shape for grad in gradients()]
        assert counter.frame_count == 2, "one for the first layer, which has nothing to add yet, one for all others"
    assert shapes == 2 * [parameter.shape for parameter in parameters]
    assert len(list(gradients())) == len(shapes)
    assert counter.frame_count == 2 and all("forward" not in vars(layer) for layer in model.layers)


def test_batches_move_as_they_are():
    batch = (torch.zeros(2), {"rows": torch.ones(3)}, [torch.ones(1), "name"])
    assert move_batch(batch, "cpu") is batch
    moved = move_batch(batch, "meta")
    assert moved[0].device.type == moved[1]["rows"].device.type == moved[2][0].device.type == "meta"
    assert type(moved) is tuple and moved[2][1] == "name"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "CUDA", "cpu:0", "mps"])
def test_a_device_that_training_does_not_know_is_named(name):
    with pytest.raises(UserError, match=f"device='{name}' is not cpu, cuda or cuda:N"):
        TrainConfig(device=name)


@no_gpu
def test_a_gpu_that_is_not_there_is_an_error_and_is_never_taken_by_itself():
    assert choose_device() == "cpu"
    with pytest.raises(UserError, match="device=cuda is not there: .* Use --device cpu"):
        choose_device("cuda")
    config = TrainConfig(dtype="float32").resolved(COMPILE_PAYS_STEPS)
    assert config.device == "cpu" and config.compile is False
    with pytest.raises(UserError, match="compile=true is for GPUs"):
        TrainConfig(compile=True).resolved(1)
    with pytest.raises(UserError, match="cuda_graphs=true needs a GPU"):
        TrainConfig(cuda_graphs=True).resolved(1)


def test_settings_of_a_gpu_leave_a_cpu_alone():
    before = torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    with device_settings("cpu", tf32=True, deterministic=True):
        assert (torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()) == before
