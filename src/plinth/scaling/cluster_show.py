"""A plan for a cluster as a person reads it in a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from plinth.scaling.cluster_plan import ClusterPlan, Option

MEMORY_ITEMS = {
    "parameters": "fp32 share of this rank, and bf16 copies that stay",
    "gradients": "fp32",
    "optimizer": "fp32 moments",
    "activations": "kept for the backward pass",
    "logits": "with their gradient",
    "buffers": "parameters gathered for two layers, embedding and head; gradients before they are reduced",
    "margin": "kept free",
}


def print_cluster_plan(plan: ClusterPlan, console: Console) -> None:
    """Draw a plan for a cluster on a console."""
    console.print(cluster_plan_view(plan))


def cluster_plan_view(plan: ClusterPlan) -> Group:
    """Return a plan as rich renderables: the choice, its memory, its step, the runners-up, the reasons and the sources."""
    gpus = plan.config.gpus
    parts: list[RenderableType] = [
        Text(f"Plan for {plan.model} on {gpus:,} x {plan.accelerator}", style="bold"),
        _facts(plan),
        _memory(plan),
        _step(plan),
        _alternatives(plan),
        Text("Why this layout", style="italic"),
        *(Text(f"  {line}") for line in plan.explanations),
        _sources(plan),
        *(Text(f"! {line}", style="yellow") for line in plan.warnings),
    ]
    return Group(*parts)


def settings(plan: ClusterPlan) -> str:
    """Return the options of `plinth pretrain` that run the layout, or what it would need."""
    layout = plan.chosen.layout
    if not plan.runs_in_plinth:
        return "none: the layout is beyond what Plinth runs"
    sequences = plan.tokens_per_step // plan.seq_len
    return (
        f"--parallel.dp-replicate {layout.replicate} --parallel.dp-shard {layout.shard} --parallel.tp {layout.tensor} "
        f"--parallel.activation-checkpointing {layout.checkpointing} --micro-batch-size {layout.micro_batch_size} "
        f"--sequences-per-step {sequences} --seq-len {plan.seq_len}"
    )


def _facts(plan: ClusterPlan) -> Table:
    predicted, config = plan.predicted, plan.config
    energy = f"{predicted.energy_kwh / 1000:,.1f} MWh, an estimate"
    if predicted.co2_kg is not None:
        energy += f"; {predicted.co2_kg / 1000:,.1f} t CO2 at {config.co2_g_per_kwh:g} g a kWh"
    price = "no price given (price_per_gpu_hour)" if predicted.cost is None else f"{predicted.cost:,.0f}"
    micro = f"{plan.chosen.micro_batches} micro-batch{'es' * (plan.chosen.micro_batches > 1)} a rank"
    rows = [
        ("model", f"{plan.num_params / 1e9:,.3f} B parameters, {config.dtype} products, {config.optimizer}"),
        ("data", f"{_tokens(plan.tokens)} tokens, context {plan.seq_len:,}"),
        ("steps", f"{plan.steps:,} of {plan.tokens_per_step:,} tokens"),
        ("layout", f"{plan.chosen.layout}; {micro}"),
        ("in Plinth", settings(plan)),
        ("memory", f"{plan.chosen.memory.used / 1e9:.1f} GB an accelerator of {plan.usable_bytes / 1e9:.1f} GB usable"),
        ("step", f"{predicted.step_s:.3g} s"),
        ("speed", f"{predicted.tokens_per_s:,.0f} tokens/s, {predicted.tokens_per_s_per_gpu:,.0f} an accelerator"),
        (
            "utilisation",
            f"MFU {predicted.mfu:.1%} of peak bf16; attention counted causally {predicted.mfu_causal:.1%}, HFU {predicted.hfu:.1%}",
        ),
        ("time", f"{predicted.days:,.1f} days, {predicted.gpu_hours:,.0f} accelerator hours, without interruptions"),
        ("loss", f"{predicted.loss_nats:.2f} nats a token"),
        ("energy", energy),
        ("cost", price),
    ]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="cyan"), value)
    return table


def _tokens(count: float) -> str:
    return f"{count / 1e12:,.2f} T" if count >= 1e12 else f"{count / 1e9:,.2f} B"


def _memory(plan: ClusterPlan) -> Table:
    table = Table(title="Memory of an accelerator", title_justify="left")
    for name in ("item", "GB", "what"):
        table.add_column(name, justify="right" if name == "GB" else "left")
    for name, gloss in MEMORY_ITEMS.items():
        table.add_row(name, f"{getattr(plan.chosen.memory, name) / 1e9:.2f}", gloss)
    table.add_row("total", f"{plan.chosen.memory.total / 1e9:.2f}", "", style="bold")
    return table


def _step(plan: ClusterPlan) -> Table:
    step = plan.chosen.step
    assert step is not None
    table = Table(title="A step", title_justify="left")
    for name in ("part", "operation", "ranks", "link", "GB received", "s", "adds s", "share"):
        table.add_column(name, justify="left" if name in ("part", "operation", "link") else "right")
    computed = {
        "products and attention": step.products_s,
        "computed again": step.recomputed_s,
        "memory passes": step.passes_s,
        "optimizer": step.optimizer_s,
        "pipeline bubble": step.bubble_s,
    }
    for name, seconds in computed.items():
        if seconds:
            table.add_row(name, "", "", "", "", f"{seconds:.3g}", f"{seconds:.3g}", f"{seconds / step.total_s:.1%}")
    for each in step.transfers:
        share = f"{each.exposed_s / step.total_s:.1%}"
        times = (f"{each.seconds:.3g}", f"{each.exposed_s:.3g}", share)
        table.add_row(each.name, each.operation, f"{each.group}", each.link, f"{each.bytes / 1e9:,.1f}", *times)
    table.add_row("step", "", "", "", "", "", f"{step.total_s:.3g}", "100.0%", style="bold")
    return table


def _alternatives(plan: ClusterPlan) -> Table:
    table = Table(title="Runners-up", title_justify="left")
    for name in ("layout", "micro-batches", "GB", "step s", "against it", "in Plinth"):
        table.add_column(name, justify="left" if name in ("layout", "in Plinth") else "right")
    for option in (plan.chosen, *plan.alternatives):
        table.add_row(*_row(option, plan.chosen), style="bold green" if option is plan.chosen else None)
    return table


def _row(option: Option, chosen: Option) -> tuple[str, ...]:
    return (
        str(option.layout),
        f"{option.micro_batches}",
        f"{option.memory.used / 1e9:.1f}",
        f"{option.step_s:.3g}",
        f"{option.step_s / chosen.step_s - 1:+.1%}",
        "yes" if option.runs_in_plinth else "no",
    )


def _sources(plan: ClusterPlan) -> Table:
    table = Table(title="Where the numbers come from", title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, text in plan.sources.items():
        table.add_row(name, text)
    return table
