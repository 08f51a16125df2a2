"""The table of docs/factuality.md, from the record of factuality_tuning.py."""

from __future__ import annotations

COLUMNS = {
    "known_exact": "taught: right",
    "over_refusal": "taught: refused",
    "heldout_refusal": "never taught: refused",
    "invented_refusal": "invented: refused",
    "accuracy_answered": "answers given: right",
    "coverage": "coverage",
    "auroc": "AUROC",
    "ece": "ECE",
}


def factuality_table(record: dict) -> str:
    """Return each model's scores, the seeds' mean with the lowest and the highest of them."""
    lines = ["| tuned on | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    seeds = {row["seed"] for row in record["rows"]}
    for name in dict.fromkeys(row["name"] for row in record["rows"]):
        scores = [row["scores"] for row in record["rows"] if row["name"] == name]
        cells = [cell([each[key]["value"] for each in scores if key in each], key in ("auroc", "ece")) for key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    facts = record["rows"][0]["asked"]["known"]["facts"]
    widest = max(score["ci95"][1] - score["ci95"][0] for row in record["rows"] for key, score in row["scores"].items() if key in COLUMNS)
    lines += [
        "",
        f"{record['num_params'] / 1e6:.2f} M parameters; {len(seeds)} seeds of what is taught, drawn, tuned: their mean (lowest–highest);"
        f" the 95 % interval of one seed over whole facts is up to {100 * widest:.0f} points wide. {sum(facts.values()):,} facts asked, of "
        f"which, with seed 0, {facts.get('unknown', 0):,} are unknown by the model's own answers. The last row never sees a right answer "
        "of the pool.",
    ]
    return "\n".join(lines)


def cell(values: list[float], plain: bool) -> str:
    if not values:
        return ""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    if plain:
        return f"{mean:.2f} ({low:.2f}–{high:.2f})"
    return f"{100 * mean:.0f} % ({100 * low:.0f}–{100 * high:.0f})"
