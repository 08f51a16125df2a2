"""Why a plan is what it is: where each of its numbers comes from, and what to doubt."""

from __future__ import annotations

import math

from plinth.models.cost import MAX_MUON_SHARE, muon_cost_share
from plinth.scaling.laws import REPETITION, STEP_LAW, ChinchillaLaw
from plinth.scaling.plan_record import Plan

MANY_EPOCHS = 16.0
FEW_STEPS = 500
WIDE_MISFIT = 0.15
BUSY_LOAD = 0.75


def plan_sources(plan: Plan, law: ChinchillaLaw) -> dict[str, str]:
    """Return, for each quantity of a plan, the law, rule or measurement that it comes from, with its reference."""
    options = plan.config
    loss = f"{law.name} ({law.source}) with repeated text by the {REPETITION.name} ({REPETITION.source})"
    timing = (
        f"time model on {plan.probe.time_model.num_points} measured training speeds "
        f"(error at those points {plan.probe.time_model.relative_rmse:.0%})"
    )
    energy = f"estimate: {plan.probe.cores} cores x {options.watts_per_core:g} W, no counter read"
    price = f"{options.price_per_hour:g} an hour" if options.price_per_hour else "no price given (price_per_hour=0)"
    muon = muon_cost_share(plan.model.hidden_size, plan.tokens_per_step)
    rule = "<=" if muon <= MAX_MUON_SHARE else ">"
    sources = {
        "bpb": loss,
        "loss_nats": f"bpb x {plan.corpus.bytes_per_token(plan.vocab_size):.3f} bytes a token, measured on this text",
        "model": f"lowest bpb over shapes and vocabularies within the budget, by {law.name}",
        "vocab_size": "lowest bpb: a head must pay for itself in bytes a token (after Tao et al. 2024, arXiv:2407.13623)",
        "tokens": timing if plan.budget.kind == "time" else f"what the budget of {plan.budget} allows",
        "steps": "tokens / tokens_per_step",
        "epochs": f"tokens over the {plan.corpus.text_bytes:,} bytes of this text",
        "seq_len": "rule by model size: 256 below 20 M parameters, 512 below 100 M, then 1024",
        "short_share": "the option's value; a gain at equal time at both sizes of docs/ablations.md"
        if options.short_share
        else "none asked for",
        "tokens_per_step": f"{STEP_LAW.name} ({STEP_LAW.source}); less for a thousand updates, more to make Muon cheap",
        "lr": f"{STEP_LAW.name} ({STEP_LAW.source}), at most {STEP_LAW.max_lr:g}",
        "muon_lr": "the option's value; at both sizes of docs/ablations.md better than twice as much",
        "muon_gain": f"a token under Muon counts {options.muon_gain:g} times (ratio of record times of modded-nanogpt, 31.4 to 24.9 min)",
        "optimizer": f"rule: Muon costs 5 x width / tokens_per_step = {muon:.2f} {rule} {MAX_MUON_SHARE:g} of a step",
        "adam_beta2": "longer memory at small batches (Porian et al. 2024, arXiv:2406.19146)",
        "warmup_steps": f"{options.warmup_share:.0%} of the steps, at least 10",
        "decay_steps": f"{options.decay_share:.0%} of the steps (warm-up, stable, decay: Hägele et al. 2024, arXiv:2405.18392)",
        "dtype": "measured: matrix rate " + ", ".join(f"{k} {v / 1e12:.2f} TFLOP/s" for k, v in plan.probe.matmul_flops_per_s.items()),
        "time_s": timing,
        "tokens_per_s": timing,
        "mfu": "FLOPs over time, against the measured matrix rate",
        "flops": "counted from the shape, head included, causal attention",
        "memory_bytes": "counted from the shape: weights, gradients, optimizer, activations (upper estimate); plus what the process held",
        "energy_j": energy,
        "cost": price,
        "num_facts": f"finetuning tokens at {options.exposures_per_fact} exposures a fact",
        "compile": "measured speed-up against time to compile" if options.compile_speedup else "no measurement given, so not used",
    }
    chosen_by_user = {"optimizer", "lr", "tokens_per_step", "seq_len", "vocab_size"}
    return {name: "given" if name in chosen_by_user and getattr(options, name) is not None else text for name, text in sources.items()}


def doubts(plan: Plan) -> tuple[str, ...]:
    """Return what a reader should not take at face value."""
    found = []
    first, *others = plan.laws
    if first.outside_fit:
        found.append(
            f"this run lies outside the sizes and lengths that the law `{first.law}` was fitted on: it is extrapolated. Trust the order "
            "of the alternatives more than the predicted loss, and the actual loss more than either."
        )
    if plan.vocab_size and plan.predicted.loss_nats > math.log(plan.vocab_size):
        found.append("the predicted loss is above that of a uniform guess: the law does not hold here, only its order of runs may.")
    if others:
        low, high = min(each.bpb for each in plan.laws), max(each.bpb for each in plan.laws)
        found.append(f"the laws disagree: {low:.2f} to {high:.2f} bits per byte for this run.")
    if plan.epochs > MANY_EPOCHS:
        found.append(f"the text is read {plan.epochs:.0f} times; beyond some {MANY_EPOCHS:.0f} passes more text helps, more time does not.")
    if plan.epochs >= 0.98 * plan.config.max_epochs:
        found.append(f"pretraining ends at max_epochs={plan.config.max_epochs:g} and leaves part of the budget unused.")
    if plan.steps < FEW_STEPS:
        found.append(f"{plan.steps} updates are few: loss laws describe runs of a thousand and more.")
    if plan.probe.load_average > plan.probe.cores * BUSY_LOAD:
        found.append(
            f"the machine was busy at the probe (load {plan.probe.load_average:.1f} on {plan.probe.cores} cores): on a quiet one "
            "training is faster, and a larger run would fit."
        )
    if plan.probe.time_model.relative_rmse > WIDE_MISFIT:
        found.append(
            f"the time model misses its own measurements by {plan.probe.time_model.relative_rmse:.0%}; "
            "the machine was busy or is unlike the model, so times are rough."
        )
    return tuple(found)
