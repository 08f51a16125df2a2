"""Time of a step on a cluster: each part worked by hand, and laws."""

from dataclasses import replace

import pytest

from plinth.scaling.accelerators import find_accelerator
from plinth.scaling.cluster_config import Layout
from plinth.scaling.cluster_time import CONSTANTS, Links, stage_work, step_time
from plinth.scaling.known_models import find_model

LLAMA = find_model("llama-3-8b")
H100 = find_accelerator("h100-sxm")
HEAD = 128256 * 4096


def transfers(layout, micro_batches=1, **options):
    return {each.name: each for each in step_time(LLAMA, layout, H100, 8192, micro_batches, **options).transfers}


def test_one_accelerator_moves_nothing_and_takes_the_time_of_its_products():
    step = step_time(LLAMA, Layout(), H100, 8192, 1)
    assert step.transfers == () and step.bubble_s == step.recomputed_s == 0
    rate = 794.5e12 * H100.sustained_share
    linear, attention = 6 * (32 * LLAMA.layer_matrix_params + HEAD), 3 * LLAMA.attention_flops_per_token(8192)
    assert step.products_s == pytest.approx(8192 * (linear + attention / CONSTANTS.attention_share) / rate)
    assert step.total_s == pytest.approx(step.products_s + step.passes_s + step.optimizer_s)
    assert step.optimizer_s == pytest.approx(30 * LLAMA.num_params / (3.35e12 * CONSTANTS.memory_share))


def test_a_ring_runs_at_the_rate_of_its_slowest_hop():
    links = Links(H100, 8)
    seconds, link = links.ring(Layout(shard=8), "state", 7e9)
    assert link == "node" and seconds == pytest.approx(7e9 / (0.8 * 450e9) + 7 * CONSTANTS.link_latency_s)
    seconds, link = links.ring(Layout(shard=16), "state", 7e9)  # eight cards of 50 GB/s a node
    assert link == "network" and seconds == pytest.approx(7e9 / (0.8 * 400e9) + 14 * CONSTANTS.link_latency_s + CONSTANTS.network_latency_s)
    seconds, link = links.ring(Layout(shard=16, tensor=8), "state", 7e9)  # one rank of the group a node: one card
    assert link == "network" and seconds == pytest.approx(7e9 / (0.8 * 50e9) + 15 * CONSTANTS.network_latency_s)


def test_groups_are_laid_out_tensor_first():
    layout = Layout(tensor=2, context=2, shard=2, replicate=4, pipeline=2)
    assert layout.gpus == 64 and layout.data == 8
    assert layout.group_on_node("tensor", 8) == (2, 2)
    assert layout.group_on_node("context", 8) == (2, 2)
    assert layout.group_on_node("state", 8) == (4, 4)
    assert layout.group_on_node("replicate", 8) == (4, 1)
    assert layout.group_on_node("next stage", 8) == (2, 1) and Layout(pipeline=8).group_on_node("next stage", 8) == (2, 2)


def test_bytes_of_sharding():
    share = 63 / 64
    found = transfers(Layout(shard=64), 3)
    assert found["FSDP parameters"].bytes == pytest.approx(3 * 2 * 2 * LLAMA.num_params * share)  # bf16, forward and backward
    assert found["FSDP gradients"].bytes == pytest.approx(3 * 4 * LLAMA.num_params * share)
    once = transfers(Layout(shard=64, reduce_each=False), 3)
    assert once["FSDP gradients"].bytes == pytest.approx(4 * LLAMA.num_params * share)
    kept = transfers(Layout(shard=64, reshard=False, reduce_each=False), 3)
    assert kept["FSDP parameters"].bytes == pytest.approx(2 * LLAMA.num_params * share)
    copies = transfers(Layout(replicate=8, shard=8), 3)["HSDP gradients"]
    assert copies.bytes == pytest.approx(2 * 4 * LLAMA.num_params / 8 * 7 / 8) and copies.operation == "all-reduce"


def test_bytes_of_tensor_context_and_pipeline_parallelism():
    tensor = transfers(Layout(tensor=4), 5)["TP activations"]
    assert tensor.bytes == pytest.approx(5 * 32 * 8 * 2 * 8192 * 4096 * 3 / 4) and tensor.exposed_s == tensor.seconds
    recomputed = transfers(Layout(tensor=4, checkpointing="block"), 5)["TP activations"]
    assert recomputed.bytes == pytest.approx(1.5 * tensor.bytes)
    behind = transfers(Layout(tensor=4, overlap_tensor=True), 5)["TP activations"]
    assert behind.exposed_s == pytest.approx(tensor.seconds * (1 - CONSTANTS.tensor_overlap))
    context = transfers(Layout(context=4), 5)["CP keys and values"]
    assert context.bytes == pytest.approx(5 * 32 * 3 * 2 * 8192 * 2 * 1024 * 3 / 4)
    pipeline = transfers(Layout(pipeline=4, virtual_stages=2), 5)["PP activations"]
    assert pipeline.bytes == pytest.approx(5 * 2 * 2 * 2 * 8192 * 4096)


def test_the_bubble_is_stages_less_one_over_chunks():
    for chunks in (1, 2, 4):
        layout = Layout(pipeline=4, virtual_stages=chunks)
        step = step_time(LLAMA, layout, H100, 8192, 8)
        micro_s = stage_work(LLAMA, layout, H100, 8192, "bf16").total_s
        assert step.bubble_s == pytest.approx(3 / chunks * micro_s)


def test_recomputing_whole_blocks_adds_a_forward_pass_of_them():
    shape = find_model("llama-3-70b")
    none, block = (step_time(shape, Layout(checkpointing=mode), H100, 8192, 1) for mode in ("none", "block"))
    blocks = shape.attention_flops_per_token(8192) / CONSTANTS.attention_share + 2 * 80 * shape.layer_matrix_params
    assert block.recomputed_s == pytest.approx(8192 * blocks / (794.5e12 * H100.sustained_share))
    assert block.products_s == pytest.approx(none.products_s) and block.passes_s == pytest.approx(none.passes_s * 4 / 3)


@pytest.mark.parametrize("name", ["link_bandwidth", "network_bandwidth", "memory_bandwidth", "matmul_bf16"])
def test_a_faster_machine_is_never_slower(name):
    layout = Layout(replicate=2, shard=8, tensor=4)
    slow, fast = (step_time(LLAMA, layout, gpu, 8192, 2).total_s for gpu in (H100, replace(H100, **{name: 2 * getattr(H100, name)})))
    assert fast < slow


def test_fp8_speeds_up_the_blocks_and_pays_for_its_casts():
    wide, narrow = (step_time(LLAMA, Layout(), H100, 8192, 1, dtype=dtype) for dtype in ("bf16", "fp8"))
    assert narrow.products_s < wide.products_s and narrow.passes_s > wide.passes_s and narrow.total_s < wide.total_s


def test_kernels_have_a_least_time():
    tiny = find_model("gpt-2")
    step = step_time(tiny, Layout(), H100, 16, 1)
    assert step.products_s + step.passes_s > 12 * CONSTANTS.floor_s


def test_muon_adds_its_products_divided_over_the_shards():
    adamw, muon = (step_time(LLAMA, Layout(shard=64), H100, 8192, 1, optimizer=name).optimizer_s for name in ("adamw", "muon"))
    more = step_time(LLAMA, Layout(shard=128), H100, 8192, 1, optimizer="muon").optimizer_s
    assert adamw < more < muon and more == pytest.approx(muon / 2)
