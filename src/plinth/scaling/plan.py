"""From a budget, a text and a machine to the run that is predicted to end with the lowest loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from plinth.config import UserError, load_config, nearest
from plinth.energy import estimate_energy
from plinth.models import cost
from plinth.scaling.budget import Budget, parse_budget
from plinth.scaling.candidates import MIN_SEQUENCES, Allowance, Candidate, configs, enumerate_candidates, predict_bpb
from plinth.scaling.corpus import CorpusStats
from plinth.scaling.explain import doubts, plan_sources
from plinth.scaling.laws import (
    LAWS,
    NATS_PER_BIT,
    REPETITION,
    STEP_LAW,
    ChinchillaLaw,
    default_law,
)
from plinth.scaling.plan_config import PlanConfig
from plinth.scaling.plan_record import (
    Alternative,
    LawPrediction,
    Plan,
    Predicted,
    StageBudget,
    compare,
    load_plan,
    save_plan,
)
from plinth.scaling.probe import Probe
from plinth.scaling.timing import body_params, step_cost

TEMPLATE_TOKENS = 4  # special tokens of a question with its answer
DPO_REFERENCE_COST = 4.0 / 3.0  # the reference model's forward pass beside policy's forward and backward
ALTERNATIVES = 8
TYPICAL_MFU = 0.3
TYPICAL_TOKENS_PER_PARAM = 20.0

__all__ = ["Budget", "Plan", "PlanConfig", "compare", "load_plan", "make_plan", "parse_budget", "save_plan"]


def make_plan(
    budget: str | Budget,
    corpus: CorpusStats,
    probe: Probe,
    options: PlanConfig | None = None,
    *,
    local_law: ChinchillaLaw | None = None,
) -> Plan:
    """Choose the run with the lowest predicted loss within a budget.

    `local_law`, fitted in nats a byte on runs like this one, takes the place of the published default unless
    `options.law` names another. Runs whose predictions lie within `options.tolerance` of the best count as equal:
    among them the one with the most parameters is taken when facts are to be taught, else the fastest to serve.

    Raises UserError when the budget is too small for any training; it names the smallest useful one.
    """
    budget, options = parse_budget(budget), options or PlanConfig()
    allowance = pretrain_allowance(budget, corpus, options)
    law = choose_law(options.law, local_law, expected_flops(allowance, probe))
    memory_bytes = int(min(options.memory_share * probe.memory_bytes, options.max_memory_bytes or math.inf))
    found = enumerate_candidates(allowance, corpus, probe, law, memory_bytes, options)
    if budget.kind == "tokens":
        found = _compute_optimal_first(found, corpus, law)
    if not found:
        raise UserError(_too_small(budget, corpus, probe, options, memory_bytes))
    chosen = choose(found, corpus, options, budget)
    return _assemble(chosen, found, budget, corpus, probe, options, law, local_law)


def choose_law(name: str | None, local_law: ChinchillaLaw | None, flops: float) -> ChinchillaLaw:
    """Return the law that a plan minimises: the one named, or the local one, or the one fitted nearest to such a run.

    `name` may be a JSON file that holds the fields of a ChinchillaLaw. Raises UserError for an unknown name.
    """
    if name is None:
        return local_law or default_law(flops)
    if name.endswith(".json"):
        return load_config(ChinchillaLaw, Path(name))
    if name not in LAWS:
        raise UserError(f"law={name!r} is not known.{nearest(name, LAWS)} Known: {', '.join(LAWS)}, or a .json file of your own.")
    return LAWS[name]


def expected_flops(allowance: Allowance, probe: Probe) -> float:
    """Return the order of magnitude of the FLOPs that a plan will spend."""
    if allowance.flops is not None:
        return allowance.flops
    if allowance.seconds is not None:
        return allowance.seconds * TYPICAL_MFU * probe.matmul_flops_per_s[probe.dtype]
    assert allowance.tokens is not None
    return 6.0 * allowance.tokens * allowance.tokens / TYPICAL_TOKENS_PER_PARAM


def pretrain_share(corpus: CorpusStats, options: PlanConfig) -> float:
    """Return pretraining's share of the budget: all of it without instruction data."""
    return options.pretrain_share if corpus.has_instructions else 1.0


def pretrain_allowance(budget: Budget, corpus: CorpusStats, options: PlanConfig) -> Allowance:
    """Return what pretraining may spend. A budget in tokens means tokens of pretraining, all of them."""
    if budget.kind == "tokens":
        return Allowance(None, None, budget.value)
    amount = budget.value * pretrain_share(corpus, options)
    if budget.kind == "flops":
        return Allowance(None, amount, None)
    return Allowance(amount * (1.0 - options.overhead_share), None, None)


def choose(found: list[Candidate], corpus: CorpusStats, options: PlanConfig, budget: Budget) -> Candidate:
    """Return the best candidate, ties within the tolerance broken by what comes after pretraining."""
    if budget.kind == "tokens":
        return found[0]
    equals = [candidate for candidate in found if candidate.bpb <= found[0].bpb * (1.0 + options.tolerance)]
    if corpus.has_instructions:
        return max(equals, key=lambda candidate: (body_params(candidate.config), -candidate.bpb))
    return min(equals, key=lambda candidate: (body_params(candidate.config), candidate.bpb))


def _compute_optimal_first(found: list[Candidate], corpus: CorpusStats, law: ChinchillaLaw) -> list[Candidate]:
    """Order by distance from the compute-optimal size: with tokens alone limited, the largest model would always win."""

    def distance(candidate: Candidate) -> tuple[float, float]:
        text_bytes = candidate.tokens * corpus.bytes_per_token(candidate.config.vocab_size)
        effective = REPETITION.effective_tokens(corpus.text_bytes, text_bytes) / law.bytes_per_token
        ratio = body_params(candidate.config) / law.optimal_params(effective)
        return abs(math.log(ratio)), candidate.bpb

    best_vocab = min(found, key=lambda candidate: candidate.bpb).config.vocab_size if found else 0
    return sorted((c for c in found if c.config.vocab_size == best_vocab), key=distance)


def smallest_useful(budget: Budget, corpus: CorpusStats, probe: Probe, options: PlanConfig) -> Budget:
    """Return the least budget of this kind with which the cheapest model gets `min_steps` updates."""
    best = math.inf
    for config, seq_len in configs(corpus, options):
        tokens_per_step = options.tokens_per_step or MIN_SEQUENCES * seq_len
        work = step_cost(config, tokens_per_step, seq_len, options.optimizer or "adamw")
        unit = {"time": probe.time_model.step_s(work), "flops": work.flops, "tokens": float(tokens_per_step)}
        best = min(best, unit[budget.kind])
    share = 1.0 if budget.kind == "tokens" else pretrain_share(corpus, options)
    reserve = 1.0 - options.overhead_share if budget.kind == "time" else 1.0
    amount = 1.1 * best * (options.min_steps + 1) / share / reserve
    digits = 10.0 ** (math.floor(math.log10(amount)) - 1)
    return Budget(budget.kind, math.ceil(amount / digits) * digits)


def _too_small(budget: Budget, corpus: CorpusStats, probe: Probe, options: PlanConfig, memory_bytes: int) -> str:
    least = smallest_useful(budget, corpus, probe, options)
    if budget.value >= least.value:
        return (
            f"no model fits: {memory_bytes / 1e9:.2g} GB of memory, {corpus.text_bytes:,} bytes of text and the options given leave "
            f"none with {options.min_steps} updates. Raise max_memory_bytes or max_epochs, add text, or lower tokens_per_step."
        )
    return (
        f"budget={budget} is too small for any training: the smallest useful budget here is {least} "
        f"({options.min_steps} updates of the smallest model). Pass --budget {_as_argument(least)} or more."
    )


def _as_argument(budget: Budget) -> str:
    """Return a budget as it is written on the command line."""
    return f"{math.ceil(budget.value)}s" if budget.kind == "time" else f"{budget.value:.2g}{budget.kind}"


def _assemble(
    chosen: Candidate,
    found: list[Candidate],
    budget: Budget,
    corpus: CorpusStats,
    probe: Probe,
    options: PlanConfig,
    law: ChinchillaLaw,
    local_law: ChinchillaLaw | None,
) -> Plan:
    body = body_params(chosen.config)
    bytes_per_token = corpus.bytes_per_token(chosen.config.vocab_size)
    stages = stage_budgets(chosen, budget, corpus, options)
    predicted = predict(chosen, stages, corpus, probe, options)
    compiled = compile_pays(predicted.time_s, options)
    lr = options.lr or STEP_LAW.lr(body, chosen.tokens)
    warmup_steps = min(max(10, round(options.warmup_share * chosen.steps)), max(1, chosen.steps // 4))
    plan = Plan(
        budget=budget,
        model=chosen.config,
        num_params=cost.count_params(chosen.config)["total"],
        body_params=body,
        vocab_size=chosen.config.vocab_size,
        seq_len=chosen.seq_len,
        tokens_per_step=chosen.tokens_per_step,
        micro_batch_size=chosen.micro_batch_size,
        steps=chosen.steps,
        tokens=chosen.tokens,
        epochs=chosen.tokens * bytes_per_token / corpus.text_bytes,
        dtype=probe.dtype,
        compile=compiled,
        optimizer=chosen.optimizer,
        lr=round(lr, 6),
        muon_lr=options.muon_lr,
        weight_decay=options.weight_decay,
        adam_beta2=0.99 if chosen.tokens_per_step < 65_536 else 0.95,
        warmup_steps=warmup_steps,
        decay_steps=min(round(options.decay_share * chosen.steps), chosen.steps - warmup_steps),
        stages=stages,
        num_facts=count_facts(stages, bytes_per_token, options),
        predicted=predicted,
        laws=law_predictions(chosen, corpus, law, local_law, options),
        alternatives=near_best(chosen, found, corpus),
        sources={},
        warnings=(),
        corpus=corpus,
        probe=probe,
        config=options,
    )
    return replace(plan, sources=plan_sources(plan, law), warnings=doubts(plan))


def stage_budgets(chosen: Candidate, budget: Budget, corpus: CorpusStats, options: PlanConfig) -> tuple[StageBudget, ...]:
    """Return what each stage may spend, in seconds and in tokens at the model's speed.

    The model's predicted speed and the pretraining share fix the rate of exchange, whatever the budget counts.
    """
    seconds_per_token = chosen.step_s / chosen.tokens_per_step
    share = pretrain_share(corpus, options)
    pretrain_s = chosen.steps * chosen.step_s
    stages = [StageBudget("pretrain", share, pretrain_s, chosen.tokens)]
    if not corpus.has_instructions:
        return tuple(stages)
    whole_s = pretrain_s / share
    if budget.kind == "time":  # a run that max_epochs cut short leaves the others' time as it is
        whole_s = budget.value * (1.0 - options.overhead_share)
    for name, part, expense in (("sft", options.sft_share, 1.0), ("dpo", options.dpo_share, DPO_REFERENCE_COST)):
        stages.append(StageBudget(name, part, part * whole_s, int(part * whole_s / seconds_per_token / expense)))
    return tuple(stages)


def count_facts(stages: tuple[StageBudget, ...], bytes_per_token: float, options: PlanConfig) -> int:
    """Return how many facts the finetuning share can show `exposures_per_fact` times."""
    tokens = sum(stage.tokens for stage in stages if stage.stage == "sft")
    tokens_per_example = options.bytes_per_example / bytes_per_token + TEMPLATE_TOKENS
    return int(tokens / tokens_per_example / options.exposures_per_fact)


def predict(chosen: Candidate, stages: tuple[StageBudget, ...], corpus: CorpusStats, probe: Probe, options: PlanConfig) -> Predicted:
    """Return the expected results of a run and what it takes."""
    time_s = chosen.steps * chosen.step_s
    total_time_s = sum(stage.time_s for stage in stages) / (1.0 - options.overhead_share)
    return Predicted(
        bpb=chosen.bpb,
        loss_nats=chosen.bpb * NATS_PER_BIT * corpus.bytes_per_token(chosen.config.vocab_size),
        time_s=time_s,
        tokens_per_s=chosen.tokens_per_step / chosen.step_s,
        mfu=chosen.flops / time_s / probe.matmul_flops_per_s[probe.dtype],
        flops=chosen.flops,
        memory_bytes=chosen.memory_bytes + probe.process_bytes,
        energy_j=estimate_energy(time_s, probe.cores, options.watts_per_core).joules,
        cost=time_s / 3600.0 * options.price_per_hour,
        total_time_s=total_time_s,
        total_energy_j=estimate_energy(total_time_s, probe.cores, options.watts_per_core).joules,
        total_cost=total_time_s / 3600.0 * options.price_per_hour,
    )


def compile_pays(pretrain_s: float, options: PlanConfig) -> bool:
    """Say whether compiling saves more time than it takes; without a measurement of both, no."""
    if options.compile_speedup is None or options.compile_s is None:
        return False
    return pretrain_s * (1.0 - 1.0 / options.compile_speedup) > options.compile_s


def law_predictions(
    chosen: Candidate, corpus: CorpusStats, law: ChinchillaLaw, local_law: ChinchillaLaw | None, options: PlanConfig
) -> tuple[LawPrediction, ...]:
    """Return what every law says of the chosen run, the one that chose first: their spread is the least of the doubt."""
    others = [other for other in (local_law, *LAWS.values()) if other is not None and other != law]
    params = body_params(chosen.config)
    text_bytes = chosen.tokens * corpus.bytes_per_token(chosen.config.vocab_size)
    rows = []
    for each in (law, *others):
        bpb = predict_bpb(each, chosen.config, chosen.optimizer, corpus, text_bytes, options, limit_params=each is LAWS["muennighoff"])
        law_tokens = text_bytes / each.bytes_per_token
        optimum = each.compute_optimal(6.0 * params * law_tokens)[0]
        rows.append(LawPrediction(each.name, each.source, bpb, optimum, each.is_outside(params, text_bytes)))
    return tuple(rows)


def near_best(chosen: Candidate, found: list[Candidate], corpus: CorpusStats) -> tuple[Alternative, ...]:
    """Return the best candidates, the chosen one among them, by rising predicted loss."""
    rows = found[:ALTERNATIVES]
    if chosen not in rows:
        rows = [*rows[:-1], chosen]
    return tuple(
        Alternative(
            num_layers=row.config.num_layers,
            hidden_size=row.config.hidden_size,
            vocab_size=row.config.vocab_size,
            num_params=cost.count_params(row.config)["total"],
            tokens=row.tokens,
            epochs=row.tokens * corpus.bytes_per_token(row.config.vocab_size) / corpus.text_bytes,
            tokens_per_s=row.tokens_per_step / row.step_s,
            bpb=row.bpb,
            chosen=row == chosen,
        )
        for row in sorted(rows, key=lambda candidate: candidate.bpb)
    )
