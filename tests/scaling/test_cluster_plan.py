"""The plan of a run on a cluster: the choice against an exhaustive comparison, its arithmetic, its words, its refusals."""

from dataclasses import replace

import pytest

from plinth.config import UserError
from plinth.scaling.accelerators import ACCELERATORS, find_accelerator
from plinth.scaling.cluster_config import ClusterConfig, Layout
from plinth.scaling.cluster_memory import gpu_memory
from plinth.scaling.cluster_plan import EQUAL, describe_workload, divisors, make_cluster_plan, weigh
from plinth.scaling.cluster_time import step_time
from plinth.scaling.laws import BESIROGLU, STEP_LAW


def config(gpus=64, model="llama-3-8b", **options):
    return ClusterConfig(gpus, model, **options)


@pytest.fixture(scope="module")
def plan():
    return make_cluster_plan(config(1024, "llama-3-70b", price_per_gpu_hour=2.0, co2_g_per_kwh=400))


def test_the_choice_fits_uses_every_accelerator_and_deals_the_batch(plan):
    layout = plan.chosen.layout
    assert layout.gpus == 1024 and plan.runs_in_plinth and layout.pipeline == layout.context == 1
    assert plan.chosen.memory.used <= plan.usable_bytes and plan.chosen.memory.total <= 80e9
    assert plan.chosen.micro_batches * layout.micro_batch_size * layout.data * plan.seq_len == plan.tokens_per_step
    assert plan.steps == -(-plan.tokens // plan.tokens_per_step)


def test_nothing_that_plinth_runs_is_faster_by_more_than_counts():
    work = describe_workload(config())
    plan = make_cluster_plan(work.config)
    best = min(option.step_s for option in weigh(work) if option.runs_in_plinth)
    assert best <= plan.predicted.step_s <= best * (1 + EQUAL)
    chosen = plan.chosen
    again = gpu_memory(work.shape, chosen.layout, work.seq_len, chosen.micro_batches)
    assert chosen.memory.used == again.used
    assert chosen.step == step_time(work.shape, chosen.layout, work.gpu, work.seq_len, chosen.micro_batches)


def test_more_kinds_of_parallelism_are_never_slower():
    own, any_kind = (make_cluster_plan(config(64, "llama-3-70b", parallelism=kind)) for kind in ("plinth", "any"))
    assert own.runs_in_plinth and any_kind.predicted.step_s <= own.predicted.step_s * (1 + EQUAL)
    assert any("Beyond what Plinth runs" in line for line in own.explanations)
    assert not any_kind.runs_in_plinth and any("beyond what Plinth runs" in line for line in any_kind.warnings)
    assert any("Plinth itself runs" in line for line in any_kind.explanations)


def test_the_degrees_of_llama_3_405b_come_out():
    """Meta trained it on 16,384 H100 with tensor 8 and pipeline 16 (arXiv:2407.21783, table 4)."""
    asked = config(16384, "llama-3-405b", parallelism="any", tokens=15.6e12, tokens_per_step=2**24)
    layout = make_cluster_plan(asked).chosen.layout
    assert (layout.tensor, layout.pipeline) == (8, 16)


def test_what_plinth_cannot_run_is_planned_and_marked():
    plan = make_cluster_plan(config(256, "llama-3-405b"))
    assert not plan.runs_in_plinth and plan.chosen.layout.pipeline > 1
    assert any(line.startswith("Of what Plinth runs, the leanest needs") for line in plan.explanations)


def test_speed_time_energy_and_price_follow_from_the_step(plan):
    predicted, tokens_per_s = plan.predicted, plan.tokens_per_step / plan.predicted.step_s
    assert predicted.tokens_per_s == pytest.approx(tokens_per_s)
    assert predicted.gpu_hours == pytest.approx(plan.tokens / tokens_per_s / 3600 * 1024)
    assert predicted.days == pytest.approx(predicted.gpu_hours / 1024 / 24)
    assert predicted.cost == pytest.approx(2 * predicted.gpu_hours)
    assert predicted.energy_kwh == pytest.approx(predicted.gpu_hours * 0.7 * 1.15 * 1.1)
    assert predicted.co2_kg == pytest.approx(0.4 * predicted.energy_kwh)
    assert predicted.mfu_causal < predicted.mfu and predicted.mfu_causal < predicted.hfu < 1


def test_energy_and_co2_of_llama_2_by_its_makers_rule():
    """Hours x 400 W x grid: 184,320 A100 hours are 31.22 t (arXiv:2307.09288, table 2), so 423.4 g a kWh."""
    options = dict(gpu="a100-sxm", host_share=0.0, pue=1.0, co2_g_per_kwh=423.4, tokens=2e12)
    predicted = make_cluster_plan(config(64, "llama-2-7b", **options)).predicted
    assert predicted.co2_kg / predicted.gpu_hours == pytest.approx(31_220 / 184_320, rel=1e-3)


def test_tokens_and_batch_come_from_the_laws_unless_given():
    work = describe_workload(config())
    assert BESIROGLU.optimal_params(work.tokens) == pytest.approx(work.shape.num_params)
    assert work.tokens_per_step == pytest.approx(STEP_LAW.tokens_per_step(work.tokens), rel=0.15)
    assert work.sequences % 64 == 0 and work.seq_len == 8192
    given = describe_workload(config(tokens=1e12, tokens_per_step=2**22, seq_len=4096))
    assert (given.tokens, given.tokens_per_step, given.seq_len) == (1e12, 2**22, 4096)


def test_what_is_asked_for_is_kept():
    plan = make_cluster_plan(config(64, tensor=4, shard=8, micro_batch_size=2, checkpointing="selective", tokens_per_step=2**22))
    layout = plan.chosen.layout
    assert (layout.tensor, layout.shard, layout.replicate, layout.micro_batch_size) == (4, 8, 2, 2)
    assert layout.checkpointing == "selective"
    slow = make_cluster_plan(config(64, network_gbps=100)).predicted.step_s
    assert slow > make_cluster_plan(config(64)).predicted.step_s


def test_every_reason_names_its_layout_and_runners_up_differ(plan):
    reasons = [line for line in plan.explanations if line.startswith("TP ")]
    assert {line.split()[1].rstrip(":") for line in reasons} == {"1", "2", "4", "8"} - {str(plan.chosen.layout.tensor)}
    assert any("does not fit: at least" in line for line in plan.explanations)
    kinds = {(o.layout.tensor, o.layout.replicate > 1, o.layout.checkpointing) for o in (plan.chosen, *plan.alternatives)}
    assert len(kinds) == 1 + len(plan.alternatives) == 6


def test_plinth_reduces_gradients_once_and_keeps_norms_whole():
    assert Layout(shard=8, reduce_each=False).runs_in_plinth
    assert not Layout(shard=8).runs_in_plinth and not Layout(shard=8, reduce_each=False, reshard=False).runs_in_plinth
    assert not Layout(tensor=2, reshard=False, reduce_each=False).runs_in_plinth
    assert Layout(tensor=2, reshard=False, reduce_each=False, sequence_parallel=False).runs_in_plinth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gpus=0), "gpus=0 must be positive"),
        (dict(gpus=12), "gpus=12 does not fill nodes of gpus_per_node=8. Use 8 or 16"),
        (dict(tensor=3), "tensor=3 does not divide gpus=64"),
        (dict(tensor=16), "tensor=16 does not divide gpus_per_node=8"),
        (dict(pipeline=2), "pipeline=2 is beyond what Plinth runs. Pass --parallelism any"),
        (dict(context=4, parallelism="any"), "context=4 does not divide seq_len=8192 into parts of 4096 and more. Possible: 1, 2"),
        (dict(model="gpt-2-xl", tensor=2), "tensor=2 does not divide num_heads, num_kv_heads or intermediate_size. Possible: 1"),
        (dict(gpu="h200"), "gpu='h200' is not in the table. Did you mean h200-sxm?"),
        (dict(gpu="a100-sxm", dtype="fp8"), "has no fp8 rate in the table. Use bf16, or one of h100-sxm"),
        (dict(tokens_per_step=10_000), "tokens_per_step=10000 is not a multiple of seq_len=8192"),
        (dict(tokens_per_step=8192 * 3, tensor=1, pipeline=1, context=1), "deals 3 sequences a step"),
        (dict(model="llama-3-405b", gpus=8), "llama-3-405b does not fit on gpus=8"),
        (dict(memory_margin=1.0), "memory_margin=1 is a share of the memory"),
        (dict(host_share=-1.0), "host_share=-1 must not be negative"),
    ],
)
def test_refusals_name_the_field_and_the_way_out(options, message):
    with pytest.raises(UserError) as error:
        make_cluster_plan(config(**options))
    assert message in str(error.value)


def test_every_accelerator_plans_and_only_those_without_published_runs_are_doubted():
    for gpu in ACCELERATORS.values():
        plan = make_cluster_plan(config(8, "gpt-2-xl", gpu=gpu.name))
        assert any("no published run" in line for line in plan.warnings) == (not gpu.calibrated)
        assert gpu.matmul_bf16 < gpu.peak_bf16 and 0 < plan.predicted.mfu_causal < gpu.sustained_share
    assert replace(find_accelerator("h100-sxm"), matmul_fp8=None).matmul_rate("bf16") > 0


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(1) == [1]
