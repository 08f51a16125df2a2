"""A plan keeps to its budget, its machine and its text, and says where its numbers come from."""

import dataclasses
import json
import math

import pytest
from rich.console import Console

from plinth.config import UserError, from_dict, to_dict
from plinth.recipes.stages import length_stages
from plinth.scaling.budget import parse_budget
from plinth.scaling.candidates import decoder_config, shapes
from plinth.scaling.corpus import CorpusStats
from plinth.scaling.laws import BESIROGLU, REPETITION, SMALL_CODE
from plinth.scaling.plan import Plan, PlanConfig, compare, load_plan, make_plan, save_plan, smallest_useful
from plinth.scaling.show import print_plan
from plinth.scaling.timing import body_params, step_cost
from plinth.training.optim import OptimizerConfig
from plinth.training.schedule import BatchSchedule, Stage


def test_time_budget_is_kept_and_used(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    pretrain_s = 0.45 * 240 * 0.95
    assert 0.97 * pretrain_s < plan.predicted.time_s <= pretrain_s
    assert 0.98 * 240 < plan.predicted.total_time_s <= 240
    assert plan.tokens == plan.steps * plan.tokens_per_step
    assert plan.predicted.tokens_per_s * plan.predicted.time_s == pytest.approx(plan.tokens)
    assert [stage.stage for stage in plan.stages] == ["pretrain", "sft", "dpo"]
    assert plan.stage("sft").time_s == pytest.approx(0.50 * 228) and plan.stage("absent").tokens == 0


def test_step_time_is_the_time_model_s(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    work = step_cost(plan.model, plan.tokens_per_step, plan.seq_len, plan.optimizer)
    assert plan.predicted.time_s == pytest.approx(plan.steps * probe.time_model.step_s(work))
    assert plan.predicted.flops == pytest.approx(plan.steps * work.flops)


def test_without_instructions_pretraining_gets_all(corpus, probe):
    plan = make_plan("4m", dataclasses.replace(corpus, has_instructions=False), probe)
    assert [stage.share for stage in plan.stages] == [1.0] and plan.num_facts == 0
    assert 0.95 * 228 < plan.predicted.time_s <= 228


def test_more_budget_means_lower_loss_and_no_smaller_model(corpus, probe):
    plans = [make_plan(budget, corpus, probe) for budget in ("1m", "4m", "15m", "1h")]
    losses = [plan.predicted.bpb for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert plans[0].body_params < plans[-1].body_params


def test_flops_budget(corpus, probe):
    plan = make_plan("3e13flops", corpus, probe)
    assert 0.97 * 0.45 * 3e13 < plan.predicted.flops <= 0.45 * 3e13


def test_token_budget_takes_the_compute_optimal_size(corpus, probe):
    plan = make_plan("5e6tokens", corpus, probe)
    assert 4.9e6 < plan.tokens <= 5e6
    text_bytes = REPETITION.effective_tokens(corpus.text_bytes, plan.tokens * corpus.bytes_per_token(plan.vocab_size))
    optimum = SMALL_CODE.optimal_params(text_bytes)
    sizes = [body_params(decoder_config(layers, width, plan.vocab_size, 512, None)) for layers, width in shapes(PlanConfig())]
    assert plan.body_params == min(sizes, key=lambda size: abs(math.log(size / optimum)))


def test_chosen_is_best_within_tolerance_and_exactly_best_without(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    best = min(row.bpb for row in plan.alternatives)
    assert plan.predicted.bpb <= 1.02 * best
    assert sum(row.chosen for row in plan.alternatives) == 1
    strict = make_plan("4m", corpus, probe, PlanConfig(tolerance=0.0))
    assert strict.predicted.bpb == pytest.approx(best) and strict.body_params <= plan.body_params


def test_loss_in_nats_and_bits_agree(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    bytes_per_token = corpus.bytes_per_token(plan.vocab_size)
    assert plan.predicted.loss_nats == pytest.approx(plan.predicted.bpb * math.log(2) * bytes_per_token)
    assert plan.epochs == pytest.approx(plan.tokens * bytes_per_token / corpus.text_bytes)


def test_repeated_text_is_worth_less(corpus, probe):
    small = CorpusStats(400_000, 200, corpus.vocabularies, True)
    plenty, scarce = make_plan("4m", corpus, probe), make_plan("4m", small, probe)
    assert scarce.epochs > 5 and scarce.predicted.bpb > plenty.predicted.bpb
    assert scarce.epochs <= 40.0


def test_max_epochs_ends_early_and_says_so(corpus, probe):
    tiny = CorpusStats(50_000, 20, corpus.vocabularies[:1], False)
    plan = make_plan("1h", tiny, probe, PlanConfig(hidden_size=64, num_layers=2))
    assert plan.epochs <= 40 and plan.predicted.time_s < 1800
    assert any("max_epochs" in warning for warning in plan.warnings)


def test_options_are_kept(corpus, probe):
    options = PlanConfig(
        hidden_size=192, num_layers=4, vocab_size=2048, seq_len=128, tokens_per_step=4096, optimizer="adamw", lr=1e-3, tie_embeddings=False
    )
    plan = make_plan("4m", corpus, probe, options)
    assert (plan.model.hidden_size, plan.model.num_layers, plan.vocab_size) == (192, 4, 2048)
    assert (plan.seq_len, plan.tokens_per_step, plan.optimizer, plan.lr) == (128, 4096, "adamw", 1e-3)
    assert not plan.model.tie_embeddings and plan.sources["lr"] == "given"
    assert make_plan("4m", corpus, probe, PlanConfig(min_body_params=3_000_000)).body_params >= 3_000_000


def test_memory_limit_shrinks_the_micro_batch_then_the_model(corpus, probe):
    options = PlanConfig(hidden_size=384, num_layers=8, tokens_per_step=32_768, max_memory_bytes=1_500_000_000)
    plan = make_plan("2h", corpus, probe, options)
    assert plan.predicted.memory_bytes <= 1_500_000_000
    assert plan.tokens_per_step % (plan.micro_batch_size * plan.seq_len) == 0
    assert plan.micro_batch_size < make_plan("2h", corpus, probe, dataclasses.replace(options, max_memory_bytes=None)).micro_batch_size
    with pytest.raises(UserError, match="no model fits: 0.1 GB of memory"):
        make_plan("2h", corpus, probe, PlanConfig(max_memory_bytes=100_000_000))


def test_every_core_gets_a_part_of_a_step(corpus, probe):
    for cores in (1, 2, 6):
        plan = make_plan("4m", corpus, dataclasses.replace(probe, cores=cores))
        assert plan.tokens_per_step // plan.seq_len // plan.micro_batch_size >= cores
    on_gpu = make_plan("4m", corpus, dataclasses.replace(probe, cores=6, device="cuda"))
    assert on_gpu.micro_batch_size * on_gpu.seq_len == on_gpu.tokens_per_step  # it works on the whole at once where that fits


def test_muon_by_rule(corpus, probe):
    for budget in ("1m", "10m", "1h"):
        plan = make_plan(budget, corpus, probe)
        assert plan.optimizer == OptimizerConfig().resolved(plan.model.hidden_size, plan.tokens_per_step).name


@pytest.mark.parametrize("budget", ["1s", "1e9flops", "1000tokens"])
def test_too_small_a_budget_names_the_smallest_useful_one(corpus, probe, budget):
    with pytest.raises(UserError, match="the smallest useful budget here is") as error:
        make_plan(budget, corpus, probe)
    least = str(error.value).split("Pass --budget ")[1].split()[0]
    assert make_plan(least, corpus, probe).steps >= 100
    assert smallest_useful(parse_budget(budget), corpus, probe, PlanConfig()).value > parse_budget(budget).value


def test_round_trip_through_json(corpus, probe, tmp_path):
    plan = make_plan("4m", corpus, probe)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert from_dict(Plan, json.loads(json.dumps(to_dict(plan)))) == plan
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_plan(tmp_path / "plan.json")


def test_every_prediction_has_a_source(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    missing = [f.name for f in dataclasses.fields(plan.predicted) if f.name not in plan.sources and not f.name.startswith("total_")]
    assert missing == []
    assert "no counter read" in plan.sources["energy_j"] and "no price given" in plan.sources["cost"]


def test_laws_by_size_by_name_and_by_file(corpus, probe, tmp_path):
    small = make_plan("4m", corpus, probe)
    assert small.laws[0].law == SMALL_CODE.name and len(small.laws) == 4
    assert make_plan("4m", corpus, probe, PlanConfig(law="besiroglu")).laws[0].law == BESIROGLU.name
    local = dataclasses.replace(SMALL_CODE, name="mine", irreducible=0.5)
    plan = make_plan("4m", corpus, probe, local_law=local)
    assert plan.laws[0].law == "mine" and plan.predicted.bpb < small.predicted.bpb
    (tmp_path / "law.json").write_text(json.dumps(to_dict(local)))
    assert make_plan("4m", corpus, probe, PlanConfig(law=str(tmp_path / "law.json"))).laws[0].law == "mine"
    with pytest.raises(UserError, match="law='besirogl' is not known. Did you mean besiroglu"):
        make_plan("4m", corpus, probe, PlanConfig(law="besirogl"))


def test_extrapolation_is_admitted(corpus, probe):
    plan = make_plan("4m", corpus, probe, PlanConfig(law="besiroglu"))
    assert plan.laws[0].outside_fit and any("extrapolated" in warning for warning in plan.warnings)
    assert any("uniform guess" in warning for warning in plan.warnings)


def test_a_busy_machine_is_mentioned(corpus, probe):
    assert not any("busy" in warning for warning in make_plan("4m", corpus, probe).warnings)
    busy = dataclasses.replace(probe, load_average=5.0)
    assert any("load 5.0 on 2 cores" in warning for warning in make_plan("4m", corpus, busy).warnings)


def test_price_energy_and_facts(corpus, probe):
    plan = make_plan("4m", corpus, probe, PlanConfig(price_per_hour=3.0, watts_per_core=5.0, exposures_per_fact=50))
    assert plan.predicted.total_cost == pytest.approx(3.0 * plan.predicted.total_time_s / 3600)
    assert plan.predicted.energy_j == pytest.approx(2 * 5.0 * plan.predicted.time_s)
    tokens = 160 / corpus.bytes_per_token(plan.vocab_size) + 4
    assert plan.num_facts == int(plan.stage("sft").tokens / tokens / 50)


def test_compile_only_when_measured_to_pay(corpus, probe):
    assert not make_plan("4m", corpus, probe).compile
    assert make_plan("4m", corpus, probe, PlanConfig(compile_speedup=2.0, compile_s=30.0)).compile
    assert not make_plan("1m", corpus, probe, PlanConfig(compile_speedup=2.0, compile_s=30.0)).compile


def test_schedule_fits_in_the_run(corpus, probe):
    for budget in ("20s", "4m", "1h"):
        plan = make_plan(budget, corpus, probe)
        assert 1 <= plan.warmup_steps and plan.decay_steps >= 1
        assert plan.warmup_steps + plan.decay_steps <= plan.steps


def test_compare(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    rows = compare(plan, {"bpb": plan.predicted.bpb * 1.1, "time_s": plan.predicted.time_s, "cost": 0.0})
    assert rows["bpb"]["error"] == pytest.approx(0.1) and rows["time_s"]["error"] == 0.0
    assert rows["cost"]["error"] is None and SMALL_CODE.name in rows["bpb"]["law"]
    with pytest.raises(UserError, match="tokens_per_sec is not a quantity that a plan predicts. Did you mean tokens_per_s"):
        compare(plan, {"tokens_per_sec": 1.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrain_share": 0.5}, "add up to 1"),
        ({"pretrain_share": 0.0, "sft_share": 0.95}, "leaves nothing to finetune"),
        ({"warmup_share": 0.7, "decay_share": 0.4}, "exceed 1"),
        ({"min_steps": 0}, "min_steps=0 must be positive"),
        ({"tokens_per_step": 1000, "seq_len": 256}, "not a multiple of seq_len=256"),
        ({"overhead_share": 1.0}, "leaves no time"),
    ],
)
def test_options_that_contradict_themselves(fields, message):
    with pytest.raises(UserError, match=message):
        PlanConfig(**fields)


def test_a_width_without_whole_heads_names_its_neighbours():
    with pytest.raises(UserError, match="hidden_size=250 is not a multiple of 32.*Use 224 or 256"):
        decoder_config(4, 250, 2048, 512, None)


def test_shapes_span_the_sizes_and_are_all_valid():
    sizes = [body_params(decoder_config(layers, width, 1024, 512, None)) for layers, width in shapes(PlanConfig())]
    assert min(sizes) < 200_000 and max(sizes) > 300_000_000
    assert list(shapes(PlanConfig(hidden_size=256, num_layers=6))) == [(6, 256)]


def test_drawn_plan_holds_the_decision(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    print_plan(plan, console)
    text = console.export_text()
    for wanted in (
        f"{plan.model.num_layers} layers x {plan.model.hidden_size}",
        f"{plan.predicted.bpb:.3f} bits a byte",
        "Muennighoff",
        "sft",
    ):
        assert wanted in text


def test_short_sequences_come_first_with_as_many_tokens_an_update(corpus, probe):
    plan = make_plan("4m", corpus, probe)
    schedule = BatchSchedule([Stage(*stage) for stage in length_stages(plan)], plan.steps)
    shapes_seen = [schedule.rows(step) for step in (0, plan.steps // 3, plan.steps // 2, plan.steps - 1)]
    assert [rows.seq_len for rows in shapes_seen] == [plan.seq_len // 4] * 2 + [plan.seq_len] * 2
    assert {rows.seq_len * rows.num_rows for rows in shapes_seen} == {plan.tokens_per_step}
    assert length_stages(make_plan("4m", corpus, probe, PlanConfig(short_share=0.0))) is None
    assert length_stages(dataclasses.replace(plan, seq_len=250)) is None
    with pytest.raises(UserError, match="short_share=1 must lie between"):
        PlanConfig(short_share=1.0)
