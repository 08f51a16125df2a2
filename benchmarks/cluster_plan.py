"""How far is `plinth plan --gpus` from training runs that others measured and published? Also the plan of Llama 3 70B on 1,024 H100.

Nothing is trained: published speed, utilisation and memory are set beside what the cluster model predicts for the same layouts, with one
set of constants. Writes benchmarks/records/cluster_plan.json and the tables of docs/cluster_planning.md; with `--check` it only says
whether those are what the code gives.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from plinth.cli.plan_cluster import plan_record
from plinth.scaling.cluster_config import ClusterConfig
from plinth.scaling.cluster_plan import ClusterPlan, make_cluster_plan
from plinth.scaling.published import GIB, PUBLISHED_RUNS, PublishedRun, fit_constants
from record import write_record

PAGE = Path(__file__).parents[1] / "docs" / "cluster_planning.md"
MARKER = "<!-- {name}: written by benchmarks/cluster_plan.py -->"
# Accelerator hours of whole runs, restarts and all: Llama 2, arXiv:2307.09288, table 2 (2.0 T tokens, batches of 4 M); model card of
# Llama 3 (15 T tokens and more). Neither says how many accelerators; 1,024 are assumed, and batches of 4 M and 16 M.
WHOLE_RUNS = (
    ("llama-2-7b", "a100-sxm", 2.0e12, 2**22, 184_320),
    ("llama-2-13b", "a100-sxm", 2.0e12, 2**22, 368_640),
    ("llama-2-70b", "a100-sxm", 2.0e12, 2**22, 1_720_320),
    ("llama-3-8b", "h100-sxm", 15e12, 2**24, 1_300_000),
    ("llama-3-70b", "h100-sxm", 15e12, 2**24, 6_400_000),
)


def compare(run: PublishedRun) -> dict[str, Any]:
    """Return one row: published and predicted, and what the predicted step consists of."""
    predicted, step, memory = run.predict()
    published = run.published_tokens_per_s
    parts = {"products": step.products_s, "recomputed": step.recomputed_s, "passes": step.passes_s, "optimizer": step.optimizer_s}
    parts |= {"bubble": step.bubble_s, "transfers": step.exposed_s}
    return {
        "name": run.name,
        "source": run.source,
        "assumed": run.assumed,
        "calibration": run.calibration,
        "layout": str(run.layout),
        "published_tokens_per_s_per_gpu": published,
        "predicted_tokens_per_s_per_gpu": predicted,
        "error": predicted / published - 1,
        "published_mfu": run.mfu(published),
        "predicted_mfu": run.mfu(predicted),
        "published_memory_gib": run.memory_bytes and run.memory_bytes / GIB,
        "predicted_memory_gib": memory.used / GIB,
        "predicted_shares": {name: seconds / step.total_s for name, seconds in parts.items()},
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how far the held-out rows are off."""
    errors = [abs(row["error"]) for row in rows if not row["calibration"]]
    memory = [abs(row["predicted_memory_gib"] / row["published_memory_gib"] - 1) for row in rows if row["published_memory_gib"]]
    return {
        "held_out": len(errors),
        "median_error": statistics.median(errors),
        "within_10_percent": sum(error <= 0.10 for error in errors),
        "within_15_percent": sum(error <= 0.15 for error in errors),
        "largest_error": max(errors),
        "memory_rows": len(memory),
        "median_memory_error": statistics.median(memory),
        "largest_memory_error": max(memory),
    }


def whole_run(model: str, gpu: str, tokens: float, tokens_per_step: int, published_hours: int) -> dict[str, Any]:
    """Return predicted and published accelerator hours of a whole run."""
    plan = make_cluster_plan(ClusterConfig(1024, model, gpu=gpu, tokens=tokens, tokens_per_step=tokens_per_step, parallelism="any"))
    hours = plan.predicted.gpu_hours
    layout = str(plan.chosen.layout)
    return {
        "model": model,
        "gpu": gpu,
        "layout": layout,
        "predicted": hours,
        "published": published_hours,
        "ratio": hours / published_hours,
    }


def table_of_runs(rows: list[dict[str, Any]], summary: dict[str, float]) -> str:
    """Return the comparison as Markdown."""
    lines = [
        f"{summary['held_out']} runs that no constant was fitted to: median error {summary['median_error']:.0%}, "
        f"{summary['within_10_percent']} within 10 %, {summary['within_15_percent']} within 15 %, the largest "
        f"{summary['largest_error']:.0%}. Memory, {summary['memory_rows']} runs: median error {summary['median_memory_error']:.0%}, "
        f"the largest {summary['largest_memory_error']:.0%}.",
        "",
        "| run | layout | tokens/s an accelerator: published | predicted | error | MFU: published | predicted "
        "| GiB: published | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = f"{row['published_memory_gib']:.1f} | {row['predicted_memory_gib']:.1f}" if row["published_memory_gib"] else " | "
        lines.append(
            f"| {row['name']}{' *' * row['calibration']} | {row['layout']} | {row['published_tokens_per_s_per_gpu']:,.0f} "
            f"| {row['predicted_tokens_per_s_per_gpu']:,.0f} | {row['error']:+.1%} | {row['published_mfu']:.1%} "
            f"| {row['predicted_mfu']:.1%} | {memory} |"
        )
    sources = sorted({(row["source"], row["assumed"]) for row in rows})
    lines += ["", "\\* calibration row. Sources, and what each leaves open and is assumed:", ""]
    lines += [f"- {source}{f': {assumed}' if assumed else ''}" for source, assumed in sources]
    return "\n".join(lines)


def table_of_hours(rows: list[dict[str, Any]]) -> str:
    """Return the accelerator hours of whole runs as Markdown."""
    lines = [
        "| model | accelerator | published hours | planned hours | planned / published | planned layout |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        hours = f"{row['published']:,} | {row['predicted']:,.0f} | {row['ratio']:.2f}"
        lines.append(f"| {row['model']} | {row['gpu']} | {hours} | {row['layout']} |")
    return "\n".join(lines)


def table_of_plan(own: ClusterPlan, wide: ClusterPlan) -> str:
    """Return the plan of Llama 3 70B on 1,024 H100 as Markdown: what Plinth runs, and with every kind of parallelism."""
    lines = ["| | what Plinth runs | any parallelism |", "|---|---|---|"]
    both = (own, wide)

    def row(name: str, *values: str) -> None:
        lines.append(f"| {name} | {values[0]} | {values[1]} |")

    row("layout", *(f"{plan.chosen.layout}; {plan.chosen.micro_batches} micro-batches" for plan in both))
    for item in ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "used"):
        row(f"{item}, GB an accelerator", *(f"{getattr(plan.chosen.memory, item) / 1e9:.1f}" for plan in both))
    names = dict.fromkeys(each.name for plan in both for each in plan.chosen.step.transfers)
    for name in names:
        found = [{each.name: each for each in plan.chosen.step.transfers}.get(name) for plan in both]
        shown = ("none" if each is None else f"{each.bytes / 1e9:.0f} ({each.seconds:.2f}, {each.exposed_s:.2f})" for each in found)
        row(f"{name}, GB a step (seconds, of them not hidden)", *shown)
    row("step, s", *(f"{plan.predicted.step_s:.2f}" for plan in both))
    row("tokens/s an accelerator", *(f"{plan.predicted.tokens_per_s_per_gpu:,.0f}" for plan in both))
    row("MFU", *(f"{plan.predicted.mfu:.1%}" for plan in both))
    row("days; accelerator hours", *(f"{plan.predicted.days:.1f}; {plan.predicted.gpu_hours:,.0f}" for plan in both))
    row("energy, MWh", *(f"{plan.predicted.energy_kwh / 1000:,.0f}" for plan in both))
    return "\n".join(lines)


def put(page: str, name: str, content: str) -> str:
    """Replace what stands between a marker and the next `<!-- end -->`."""
    before, rest = page.split(MARKER.format(name=name))
    return f"{before}{MARKER.format(name=name)}\n{content}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"


def main() -> int:
    rows = [compare(run) for run in PUBLISHED_RUNS]
    summary, hours = summarise(rows), [whole_run(*run) for run in WHOLE_RUNS]
    plans = [make_cluster_plan(ClusterConfig(1024, "llama-3-70b", parallelism=kind)) for kind in ("plinth", "any")]
    current = PAGE.read_text(encoding="utf-8")
    page = put(current, "runs", table_of_runs(rows, summary))
    page = put(put(page, "hours", table_of_hours(hours)), "plan", table_of_plan(*plans))
    if "--check" in sys.argv:
        return int(page != current)
    PAGE.write_text(page, encoding="utf-8")
    contention, hopper, ampere = fit_constants()
    fitted = {"contention": contention, "sustained_share_h100": hopper, "sustained_share_a100": ampere}
    question = "How far is the cluster model from published training runs, with one set of constants?"
    path = write_record(
        "cluster_plan", question, rows, summary=summary, fitted=fitted, whole_runs=hours, plans=[plan_record(plan) for plan in plans]
    )
    print(f"{summary}\nwrote {path} and {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
