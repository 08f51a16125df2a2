"""The table of docs/grpo.md, from the record of grpo_arithmetic.py."""

from __future__ import annotations

from record import threads_of

NAMES = {"sft": "after `plinth sft`", "verifier": "`plinth grpo`, rewarded by the verifier", "random": "`plinth grpo`, rewarded by a coin"}
COLUMNS = ("pass@1", "pass@8", "greedy")


def grpo_table(record: dict) -> str:
    """Return each run's scores on held-out problems with their intervals, and what it took."""
    lines = ["| model | " + " | ".join(COLUMNS) + " | updates | completions | minutes |", "|---|" + "---:|" * (len(COLUMNS) + 3)]
    for row in record["rows"]:
        cells = [cell(row["scores"][name]) for name in COLUMNS]
        completions = f"{row['completions']:,}" if "completions" in row else ""
        lines.append(f"| {NAMES[row['run']]} | {' | '.join(cells)} | {row['updates']:,} | {completions} | {row['time_s'] / 60:.1f} |")
    asked = record["rows"][0]["scores"]["pass@1"]["n"]
    lines += [
        "",
        f"{record['num_params'] / 1e6:.2f} M parameters, {threads_of(record)}, {asked:,} problems held out; draws at temperature 1, "
        "95 % intervals over problems.",
    ]
    return "\n".join(lines)


def cell(score: dict) -> str:
    low, high = score["ci95"]
    return f"{100 * score['value']:.0f} % ({100 * low:.0f}–{100 * high:.0f})"
