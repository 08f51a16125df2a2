"""A plan as a person reads it in a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from plinth.energy import JOULES_PER_KWH
from plinth.scaling.budget import format_seconds
from plinth.scaling.plan_record import Plan

SHOWN_SOURCES = ("model", "tokens", "tokens_per_step", "lr", "optimizer", "bpb", "time_s", "memory_bytes", "energy_j", "cost")


def print_plan(plan: Plan, console: Console) -> None:
    """Draw a plan on a console."""
    console.print(plan_view(plan))


def plan_view(plan: Plan) -> Group:
    """Return a plan as rich renderables: what will be done, what is expected, where it comes from, what else there was."""
    parts: list[RenderableType] = [
        Text(f"Plan for {plan.budget}{' of training' if plan.budget.kind == 'time' else ''}", style="bold"),
        _facts(plan),
        _stages(plan),
        _alternatives(plan),
        _sources(plan),
    ]
    parts += [Text(f"! {line}", style="yellow") for line in plan.warnings]
    return Group(*parts)


def _facts(plan: Plan) -> Table:
    predicted, model = plan.predicted, plan.model
    table = Table.grid(padding=(0, 2))
    bpbs = [each.bpb for each in plan.laws]
    spread = f"laws: {min(bpbs):.2f} to {max(bpbs):.2f} bits a byte"
    shape = f"{plan.num_params / 1e6:.2f} M parameters: {model.num_layers} layers x {model.hidden_size}, vocabulary {plan.vocab_size:,}"
    rate = f"{plan.muon_lr:g} (Muon), {plan.lr:g} (AdamW)" if plan.optimizer == "muon" else f"{plan.lr:g} (AdamW)"
    short = f" (a quarter of it for the first {plan.config.short_share:.0%})" if plan.config.short_share else ""
    price = f"{predicted.total_cost:.2f}" if plan.config.price_per_hour else "no price given (price_per_hour)"
    rows = [
        ("machine", f"{plan.probe.cpu}, {plan.probe.cores} cores, {plan.probe.memory_bytes / 1e9:.1f} GB, {plan.dtype}"),
        ("text", f"{plan.corpus.text_bytes / 1e6:.1f} MB in {plan.corpus.documents:,} documents"),
        ("model", shape),
        ("data", f"{plan.tokens / 1e6:.2f} M tokens, {plan.epochs:.2f} epochs, context {plan.seq_len}{short}"),
        ("steps", f"{plan.steps:,} of {plan.tokens_per_step:,} tokens; warm-up {plan.warmup_steps}, decay {plan.decay_steps}"),
        ("learning rate", rate),
        ("predicted loss", f"{predicted.bpb:.3f} bits a byte, {predicted.loss_nats:.3f} nats a token ({spread})"),
        ("predicted speed", f"{predicted.tokens_per_s:,.0f} tokens/s, {predicted.mfu:.0%} of the measured matrix rate"),
        ("predicted time", f"pretraining {format_seconds(predicted.time_s)}, all training {format_seconds(predicted.total_time_s)}"),
        ("memory", f"{predicted.memory_bytes / 1e9:.2f} GB"),
        ("energy", f"{predicted.total_energy_j / JOULES_PER_KWH * 1000:.2f} Wh, an estimate"),
        ("cost", price),
    ]
    for name, value in rows:
        table.add_row(Text(name, style="cyan"), value)
    return table


def _stages(plan: Plan) -> Table:
    table = Table(title="Budget by stage", title_justify="left")
    for name in ("stage", "share", "time", "tokens"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in plan.stages:
        table.add_row(stage.stage, f"{stage.share:.0%}", format_seconds(stage.time_s), f"{stage.tokens:,}")
    if plan.num_facts:
        table.caption = f"finetuning can show {plan.num_facts:,} facts {plan.config.exposures_per_fact} times each"
        table.caption_justify = "left"
    return table


def _alternatives(plan: Plan) -> Table:
    table = Table(title="Near-best runs", title_justify="left")
    for name in ("shape", "vocab", "params", "tokens", "epochs", "tok/s", "bits/byte"):
        table.add_column(name, justify="right")
    for row in plan.alternatives:
        table.add_row(
            f"{row.num_layers} x {row.hidden_size}",
            f"{row.vocab_size:,}",
            f"{row.num_params / 1e6:.2f} M",
            f"{row.tokens / 1e6:.2f} M",
            f"{row.epochs:.2f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.bpb:.4f}",
            style="bold green" if row.chosen else None,
        )
    return table


def _sources(plan: Plan) -> Table:
    table = Table(title="Where the numbers come from", title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name in SHOWN_SOURCES:
        table.add_row(name, plan.sources[name])
    return table
