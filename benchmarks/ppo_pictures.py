"""The pictures and tables of docs/ppo.md, from the records that ppo_gold.py and ppo_ablations.py write."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from plinth.evaluation.panels import Line, Panel, panels_svg
from record import RECORDS, threads_of

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def draw() -> int:
    """Write docs/pictures/ppo_frontier.svg and ppo_astray.svg."""
    for name, picture in (("frontier", frontier_picture), ("astray", astray_picture)):
        path = RECORDS / f"ppo_{name}.json"
        if path.exists():
            (PICTURES / f"ppo_{name}.svg").write_text(picture(json.loads(path.read_text())))
    return 0


def by_kl(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    points = sorted((row["kl_nats"]["value"], row["reward"]["value"]) for row in rows)
    return [max(0.0, kl) for kl, _ in points], [reward for _, reward in points]


def frontier_picture(found: dict[str, Any]) -> str:
    """Return reward against KL: PPO at several coefficients, the best of n, and the best that can be had."""
    ppo = [row for row in found["rows"] if row["method"] == "ppo"]
    best_of_n = [row for row in found["rows"] if row["method"] == "best_of_n"]
    ticks = [(float(kl), str(kl)) for kl in range(0, 2 + math.ceil(max(row["kl_nats"]["value"] for row in ppo)), 2)]
    inside = [(kl, reward) for kl, reward in found["attainable"] if kl <= ticks[-1][0]]
    lines = [
        Line("best that can be had", [kl for kl, _ in inside], [reward for _, reward in inside], colour=0),
        Line("PPO", *by_kl(ppo), colour=4),
        Line("best of n", *by_kl(best_of_n), colour=1),
        Line("best of n, exact", [row["kl_nats"]["value"] for row in best_of_n], [row["best_reward"] for row in best_of_n], 1, dashed=True),
    ]
    note = "held-out prompts; the best of n lies at log n − (n − 1)/n"
    return panels_svg(
        [Panel("known reward", note, lines)], title="Reward against distance", x_label="KL to the finetuned model, nats an answer",
        y_label="gold reward", x_ticks=ticks, log_x=False,
    )  # fmt: skip


def astray_picture(found: dict[str, Any]) -> str:
    """Return learnt and known reward against the root of the KL, for PPO and the best of n, with the fitted forms."""
    row = found["rows"][0]
    curve = smoothed(row["curve"])
    roots = [math.sqrt(max(0.0, point["kl"])) for point in curve]
    ranked = [math.sqrt(point["kl"]) for point in row["best_of_n"]]
    end = math.ceil(max(roots))
    panels = []
    for name, x, points, fit in (
        ("PPO", roots, curve, row["fits"]["ppo"]),
        ("best of n", ranked, row["best_of_n"], row["fits"]["best_of_n"]),
    ):
        form = np.linspace(0.25, max(x), 30).tolist()
        bent = (lambda d: math.log(d)) if name == "PPO" else (lambda d: d)
        fitted = [fit["start"] + d * (fit["alpha"] - fit["beta"] * bent(d)) for d in form]
        lines = [
            Line("learnt reward (proxy)", x, [point["reward"] for point in points], colour=1),
            Line("known reward (gold)", x, [point["gold"] for point in points], colour=4),
            Line("gold, fitted", form, fitted, colour=0, dashed=True),
        ]
        letters = "d(α − β log d)" if name == "PPO" else "d(α − β d)"
        panels.append(Panel(name, f"{letters}: α {fit['alpha']:.2f}, β {fit['beta']:.2f}, R² {fit['r2']:.2f}", lines))
    return panels_svg(
        panels, title=f"A reward learnt from {row['pairs']} pairs, followed too far", x_label="d = √KL", y_label="reward",
        x_ticks=[(float(d), str(d)) for d in range(end + 1)], log_x=False,
    )  # fmt: skip


def smoothed(curve: list[dict[str, float]], window: int = 5) -> list[dict[str, float]]:
    """Return means over `window` roll-outs of a curve, in order of KL."""
    parts = [curve[i : i + window] for i in range(0, len(curve) - window + 1, window)]
    points = [{key: statistics.fmean(point[key] for point in part) for key in ("kl", "reward", "gold")} for part in parts]
    return sorted(points, key=lambda point: point["kl"])


def plus_minus(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['value']:.{digits}f} ± {1.96 * value['stderr']:.{digits}f}"


def gold_table(found: dict[str, Any]) -> str:
    """Return what PPO with a known reward reaches."""
    row = found["rows"][0]
    reached = "not within the run" if row["goal_reached_s"] is None else f"after {row['goal_reached_s']:.0f} s"
    lines = ["| | gold reward, held-out prompts | KL, nats | tokens an answer |", "|---|---|---|---|"]
    for name, label in (("before", "finetuned"), ("after", f"{row['completions']:,} answers later")):
        part = row[name]
        lines.append(f"| {label} | {plus_minus(part['reward'])} | {plus_minus(part['kl_nats'])} | {part['answer_tokens']:.0f} |")
    lines += ["", f"The optimum is 1. A roll-out of training reached {row['goal']:.1f} {reached}; the whole took {row['wall_s']:.0f} s "
              f"with {threads_of(row)}. What it ends with, for one prompt: “{row['after']['example']}”"]  # fmt: skip
    return "\n".join(lines)


def frontier_table(found: dict[str, Any]) -> str:
    """Return reward and KL of each coefficient and n."""
    lines = [
        "![Reward against KL](pictures/ppo_frontier.svg)",
        "",
        "| | KL, nats | gold reward | best that can be had |",
        "|---|---|---|---|",
    ]
    start = next((0.0, row["best_reward"]) for row in found["rows"] if row.get("n") == 1)  # a grammar that nothing tilts
    attainable = sorted([start, *map(tuple, found["attainable"])])
    for row in found["rows"]:
        kl = row["kl_nats"]["value"]
        best = float(np.interp(kl, [point[0] for point in attainable], [point[1] for point in attainable]))
        label = f"PPO, β = {row['beta']}" if row["method"] == "ppo" else f"best of {row['n']}"
        lines.append(f"| {label} | {kl:.2f} | {plus_minus(row['reward'])} | {round(best, 2) + 0.0:.2f} |")
    return "\n".join(lines)


def astray_table(found: dict[str, Any]) -> str:
    """Return the learnt and the known reward at its start, its best and its end."""
    row = found["rows"][0]
    curve = smoothed(row["curve"])
    best = max(curve, key=lambda point: point["gold"])
    lines = ["![Learnt and known reward against the root of the KL](pictures/ppo_astray.svg)", ""]
    lines += ["| PPO on the learnt reward | KL, nats | learnt | known |", "|---|---|---|---|"]
    for label, point in (("start", curve[0]), ("where the known reward is highest", best), ("end", curve[-1])):
        lines.append(f"| {label} | {point['kl']:.1f} | {point['reward']:.2f} | {point['gold']:.2f} |")
    wrong, right = 100 * row["noise"], 100 * row["accuracy"]
    lines += ["", f"The reward model learnt from {row['pairs']} pairs, {wrong:.0f} % of them labelled the wrong way round, and orders "
              f"{right:.0f} % of held-out pairs rightly. At the end: “{row['after']['example']}”"]  # fmt: skip
    return "\n".join(lines)


def mix_table(found: dict[str, Any]) -> str:
    """Return what each run keeps of pretraining."""
    names = {"before": "finetuned", "plain": "PPO", "ptx": "PPO-ptx"}
    lines = ["| | held-out pretraining loss, nats a token | change | gold reward | KL, nats |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        change = "" if "general_change" not in row else f"{100 * row['general_change']:+.1f} %"
        lines.append(
            f"| {names[row['run']]} | {row['general_nats']:.3f} | {change} | {plus_minus(row['reward'])} | {row['kl_nats']['value']:.1f} |"
        )
    return "\n".join(lines)


def ablation_table(found: dict[str, Any]) -> str:
    """Return one row an arm, in the order of the items, the default first; bold is further off than its seeds are apart."""
    rows = found["rows"]
    default = [row for row in rows if row["arm"] == "default"]
    spans = [(min(map(value, default)), max(map(value, default))) for value in COLUMNS.values()]
    lines = ["| item | alone | switch | " + " | ".join(COLUMNS) + " |", "|---|---|---|" + "---|" * len(COLUMNS)]
    lines.append(f"| | default, {len(default)} seeds | | " + " | ".join(f"{low:.2f} to {high:.2f}" for low, high in spans) + " |")
    for row in sorted((row for row in rows if row["arm"] != "default"), key=place_of):
        cells = [marked(value(row), *span) for value, span in zip(COLUMNS.values(), spans)]
        switch = ", ".join(f"`{part}`" for part in row["switch"].split(", "))
        lines.append(f"| {row['item']} | {row['arm']} | {switch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def marked(value: float, low: float, high: float) -> str:
    """Return a number, bold where it is outside of a span by more than the span."""
    return f"{value:.2f}" if 2 * low - high <= value <= 2 * high - low else f"**{value:.2f}**"


def place_of(row: dict[str, Any]) -> float:
    """Return the number of an arm's item; those of later papers, and those of none, come behind."""
    first = row["item"].partition(",")[0]
    return float(first) if first.isdigit() else 100.0 + (not first)


COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "gold reward": lambda row: row["reward"]["value"],
    "KL, nats": lambda row: row["kl_nats"]["value"],
    "tokens": lambda row: row["answer_tokens"],
    "explained variance": lambda row: row["explained_variance"],
}
