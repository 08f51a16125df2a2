"""The table of docs/encoders.md, from its record."""

from __future__ import annotations

import statistics
from typing import Any


def encoder_table(record: dict[str, Any]) -> str:
    """Return what each pretraining reached and what it is worth with few labels: means over the seeds, with each seed's value behind."""
    counts, arms = record["labels"], dict[str, list[dict[str, Any]]]()
    for row in record["rows"]:
        arms.setdefault(row["name"], []).append(row)
    told = " | ".join(f"right of {record['tested']}, {count} labels" for count in counts)
    lines = [
        f"| pretraining | parameters | updates | tokens a second of processor time | hidden tokens, nats | {told} |",
        "|---|---|---|---|---|" + "---|" * len(counts),
    ]
    fresh = next(rows for rows in arms.values() if f"fresh accuracy {counts[0]}" in rows[0])
    lines.append(f"| none | {fresh[0]['params']:,} | | | {_mean(fresh, 'heldout_unigram_nats', '.2f')} (frequencies alone) | ")
    lines[-1] += " | ".join(_mean(fresh, f"fresh accuracy {count}", ".1%") for count in counts) + " |"
    for name, rows in arms.items():
        cells = [
            f"{rows[0]['params']:,}",
            f"{rows[0]['steps']:,}",
            _mean(rows, "tokens_per_cpu_s", ",.0f"),
            _mean(rows, "heldout_nats", ".2f"),
        ]
        cells += [_mean(rows, f"accuracy {count}", ".1%") for count in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds, chance = len(fresh), record["majority"]
    note = f"{seeds} seeds; the commonest of the {record['classes']} modules alone is right for {chance:.1%}. {record['hardware']['cpu']}."
    return "\n".join([*lines, "", note])


def _mean(rows: list[dict[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows]
    shown = ", ".join(f"{value:{form}}" for value in values)
    return f"{statistics.mean(values):{form}}" + (f" ({shown})" if len(values) > 1 and len(set(values)) > 1 else "")
