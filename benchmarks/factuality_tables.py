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
    """Return each model's scores with their intervals, of every seed."""
    lines = ["| tuned on | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    seeds = {row["seed"] for row in record["rows"]}
    for row in record["rows"]:
        cells = [cell(row["scores"].get(name), name in ("auroc", "ece")) for name in COLUMNS]
        name = row["name"] + (f", seed {row['seed']}" if len(seeds) > 1 else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    facts = record["rows"][0]["asked"]["known"]["facts"]
    lines += [
        "",
        f"{record['num_params'] / 1e6:.2f} M parameters; {sum(facts.values()):,} facts asked, of which {facts.get('unknown', 0):,} are "
        "unknown by the model's own answers; 95 % intervals over whole facts. The last row never sees a right answer of the pool.",
    ]
    return "\n".join(lines)


def cell(score: dict | None, plain: bool) -> str:
    if score is None:
        return ""
    low, high = score["ci95"]
    if plain:
        return f"{score['value']:.2f} ({low:.2f}–{high:.2f})"
    return f"{100 * score['value']:.0f} % ({100 * low:.0f}–{100 * high:.0f})"
