"""Memory of an accelerator: worked by hand, against what autograd really keeps, and laws."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from plinth.scaling.cluster_config import Layout
from plinth.scaling.cluster_memory import activation_bytes_per_token, gpu_memory, in_flight, local_params
from plinth.scaling.known_models import ModelShape, find_model, shape_from_hf

LLAMA = find_model("llama-3-8b")


def test_state_takes_sixteen_bytes_a_parameter_divided_by_the_ranks_that_share_it():
    """Rajbhandari et al. 2020: Llama 2 7B with AdamW is 100.4 GiB, 12.55 GiB on each of 8 ranks."""
    shape = find_model("llama-2-7b")
    for ranks in (8, 64):
        memory = gpu_memory(shape, Layout(shard=ranks), 4096, 1)
        state = memory.parameters + memory.gradients + memory.optimizer
        assert state == pytest.approx(16 * 6_738_415_616 / ranks, rel=1e-8)
    assert 16 * shape.num_params / 8 / 2**30 == pytest.approx(12.55, abs=0.01)


def test_without_sharding_there_is_a_bf16_copy_and_nothing_is_gathered():
    memory = gpu_memory(LLAMA, Layout(replicate=8), 8192, 4)
    assert memory.parameters == 6 * LLAMA.num_params and memory.gradients == 4 * LLAMA.num_params
    assert memory.optimizer == 8 * LLAMA.num_params and memory.buffers == 0


def test_gradients_that_add_up_over_micro_batches_are_whole_unless_reduced_each_time():
    once, each = Layout(shard=64, reduce_each=False), Layout(shard=64)
    assert gpu_memory(LLAMA, once, 8192, 2).gradients == 4 * LLAMA.num_params
    assert gpu_memory(LLAMA, once, 8192, 1).gradients == gpu_memory(LLAMA, each, 8192, 2).gradients == -(-4 * LLAMA.num_params // 64)


def test_muon_keeps_one_moment_for_the_matrices():
    matrices = 32 * LLAMA.layer_matrix_params
    adamw, muon = (gpu_memory(LLAMA, Layout(), 8192, 1, optimizer=name).optimizer for name in ("adamw", "muon"))
    assert adamw - muon == 4 * matrices


def test_llamas_proportions_give_the_34_bytes_of_the_paper():
    """Korthikanti et al. 2022, eq. 2 without its quadratic term; the fp32 scales of attention's heads come on top."""
    assert activation_bytes_per_token(LLAMA, Layout()) == 34 * 4096 + 4 * 32
    assert activation_bytes_per_token(LLAMA, Layout(tensor=8)) == (34 * 4096 + 4 * 32) / 8  # eq. 4
    whole = Layout(tensor=8, sequence_parallel=False)
    assert activation_bytes_per_token(LLAMA, whole) == 8 * 4096 + (26 * 4096 + 4 * 32) / 8  # norms' inputs and outputs on every rank
    assert activation_bytes_per_token(LLAMA, Layout(checkpointing="block")) == 2 * 4096


class Kept:
    """Counts the bytes of distinct storages that autograd saves, parameters left out."""

    def __init__(self, parameters):
        self.own = {p.untyped_storage().data_ptr() for p in parameters}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.storages.values())


class Norm(torch.autograd.Function):
    """A fused RMSNorm, as on an accelerator: it keeps its input and an fp32 scale a token. PyTorch's on a CPU keeps a copy more."""

    @staticmethod
    def forward(ctx, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, scale)
        return (x * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class GatedSilu(torch.autograd.Function):
    """A fused gate, as compiled ones are: it keeps its two inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def block(shape: ModelShape, x, weights):
    """A pre-norm block in PyTorch's operations and two fused ones; queries and keys are not rotated, which keeps nothing."""
    decoder = shape.decoder
    heads, kv_heads, dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    h = Norm.apply(x)
    q, k, v = (F.linear(h, w).unflatten(-1, (-1, dim)).transpose(1, 2) for w in weights[:3])
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    x = x + F.linear(attended.transpose(1, 2).flatten(-2), weights[3])
    h = Norm.apply(x)
    if shape.gated:
        return x + F.linear(GatedSilu.apply(F.linear(h, weights[4]), F.linear(h, weights[5])), weights[6])
    return x + F.linear(F.gelu(F.linear(h, weights[4])), weights[6])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activations_are_what_autograd_keeps(kind):
    values = dict(model_type=kind, num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=160, vocab_size=128,
                  max_position_embeddings=256, n_layer=1, n_embd=64, n_head=4, n_positions=256, n_inner=160)  # fmt: skip
    shape = shape_from_hf(values, kind)
    width, feed_forward, tokens = 64, 160, 2 * 256
    sizes = [(width, width)] * 4 + [(feed_forward, width)] * 2 + [(width, feed_forward)]
    weights = [torch.randn(size, dtype=torch.bfloat16, requires_grad=True) for size in sizes]
    x = torch.randn(2, 256, width, dtype=torch.bfloat16, requires_grad=True)
    with Kept(weights) as kept:
        y = block(shape, x, weights)
    assert y.shape == x.shape
    norm_scales = 2 * 4  # the fp32 root of each norm, which the formula leaves out
    assert kept.bytes / tokens == pytest.approx(activation_bytes_per_token(shape, Layout()) + norm_scales, rel=0.01)


def test_in_flight_follows_the_schedules():
    assert in_flight(Layout(), 7) == 1
    assert in_flight(Layout(pipeline=4), 8) == 4 and in_flight(Layout(pipeline=4), 2) == 2
    assert in_flight(Layout(pipeline=4, virtual_stages=2), 8) == 4 * (1 + 3 / 8)


def test_more_ranks_never_need_more_and_items_add_up():
    for name in ("shard", "tensor", "context", "pipeline"):
        sizes = [1, 2, 4, 8]
        used = [gpu_memory(LLAMA, replace(Layout(shard=2), **{name: size}), 8192, 8, chunked_loss=False).used for size in sizes]
        assert used == sorted(used, reverse=True), name
    memory = gpu_memory(LLAMA, Layout(shard=8, tensor=2), 8192, 3, margin=10**9)
    items = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    assert memory.used == sum(getattr(memory, item) for item in items)
    assert memory.total == memory.used + 10**9


def test_recomputing_keeps_less_and_a_chunked_loss_too():
    order = ("none", "selective", "alternate", "block")
    kept = [activation_bytes_per_token(LLAMA, Layout(checkpointing=mode)) for mode in order]
    assert kept == sorted(kept, reverse=True)
    whole, chunked = (gpu_memory(LLAMA, Layout(shard=8), 8192, 1, chunked_loss=chunk).logits for chunk in (False, True))
    assert whole == 12 * 8192 * 128256 and chunked == 4 * 4096 * 128256


def test_the_ends_of_a_pipeline_hold_embedding_or_head():
    shape = find_model("llama-3-405b")
    head = 128256 * 16384
    assert local_params(shape, Layout()) == pytest.approx(shape.num_params)
    body = (shape.num_params - 2 * head) / 126
    assert local_params(shape, Layout(pipeline=16, tensor=8)) == pytest.approx((8 * body + head) / 8)
