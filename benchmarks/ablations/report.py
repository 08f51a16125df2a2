"""The league's record, and the tables of docs/ablations.md, from the rows of its runs."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from scipy import stats

from ablations.arms import ARMS, BASELINE, SIZES, SWEEPS
from record import write_record

DOCUMENT = Path(__file__).parents[2] / "docs" / "ablations.md"
START, END = "<!-- written by benchmarks/ablations/league.py report -->", "<!-- end of what is written -->"


def paired(first: list[float], second: list[float]) -> dict:
    """Return the mean of first - second over pairs, its 95 % interval by Student's t, and the two-sided p of no difference."""
    differences = [a - b for a, b in zip(first, second)]
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return {"mean": mean, "n": n, "ci95": None, "p": None}
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    p = float(stats.ttest_rel(first, second).pvalue)
    return {"mean": mean, "n": n, "ci95": [mean - half, mean + half], "p": p}


def summarise(rows: list[dict], size: str) -> list[dict]:
    """Return, for each arm of a size, its losses by seed and its difference to the default over the seeds that both have."""
    by_arm: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row["size"] == size:
            by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    default = by_arm.get(BASELINE, {})
    summary = []
    for name in [*ARMS, *SWEEPS[size]]:
        runs = by_arm.get(name, {})
        if not runs:
            continue
        seeds = sorted(runs)
        shared = [seed for seed in seeds if seed in default]
        losses = [runs[seed]["heldout_nats"] for seed in seeds]
        entry = {"size": size, "arm": name, "heldout_nats": losses, "seeds": seeds, **{k: runs[seeds[0]][k] for k in ("steps", "tokens")}}
        entry["change"] = runs[seeds[0]]["change"]
        if shared and name != BASELINE:
            entry["minus_default"] = paired([runs[s]["heldout_nats"] for s in shared], [default[s]["heldout_nats"] for s in shared])
        summary.append(entry)
    return summary


def table(summary: list[dict], sweep: bool) -> str:
    head = "| arm | updates | tokens | held-out nats | " + ("" if sweep else "minus the default (95 % interval) | p | ") + "seeds |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for entry in summary:
        if entry["arm"].startswith("sweep") != sweep:
            continue
        mean = statistics.fmean(entry["heldout_nats"])
        cells = [entry["arm"].removeprefix("sweep "), f"{entry['steps']:,}", f"{entry['tokens']:,}", f"{mean:.3f}"]
        if not sweep:
            difference = entry.get("minus_default")
            if difference is None or difference["ci95"] is None:
                cells += ["the default" if entry["arm"] == BASELINE else f"{difference['mean']:+.3f}" if difference else "", ""]
            else:
                low, high = difference["ci95"]
                cells += [f"{difference['mean']:+.3f} ({low:+.3f} to {high:+.3f})", f"{difference['p']:.1g}"]
        lines.append("| " + " | ".join([*cells, str(len(entry["seeds"]))]) + " |")
    return "\n".join(lines)


def write_report(folder: Path) -> Path:
    """Write benchmarks/records/ablations.json and the tables between the marks of docs/ablations.md; returns the record."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    times = {size: json.loads((folder / f"times_{size}.json").read_text()) for size in SIZES}
    summary = {size: summarise(rows, size) for size in SIZES}
    record = write_record(
        "ablations", "Held-out loss after equal time of training, at about 1 M and 10 M parameters in the blocks",
        [entry for entries in summary.values() for entry in entries], step_time_over_default=times,
    )  # fmt: skip
    parts = []
    for size, entries in summary.items():
        seconds = min(second for arm in times[size].values() for second in arm["default_step_s"])
        given = f"{SIZES[size].steps * seconds:.0f} s of one core"
        parts += [
            f"### {size}: {given} a run",
            table(entries, sweep=False),
            f"### {size}: what tuned the rates, one seed",
            table(entries, True),
        ]
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(START)
    DOCUMENT.write_text(f"{before}{START}\n\n" + "\n\n".join(parts) + f"\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return record
