"""The table of docs/recurrent.md."""

from __future__ import annotations

from typing import Any


def length_table(record: dict[str, Any] | None) -> str:
    """Return how many sentences of each length come over rightly, or a sentence where nothing has been measured."""
    if record is None:
        return "Not measured yet."
    world, rows = record["world"], record["rows"]
    lengths = [str(length) for length in world["test_lens"]]
    lines = [
        f"{world['steps']} updates of {world['pairs_per_step']} sentences of 1 to {world['train_len']} words, "
        f"{rows[0]['seconds']['n']} seeds; share of {world['test_pairs']} sentences translated without a mistake, median and range over "
        "the seeds.",
        "",
        "| | parameters | operations | " + " | ".join(f"{length} words" for length in lengths) + " |",
        "|---|---|---|" + "---|" * len(lengths),
    ]
    for row in rows:
        cells = [row["by_length"][length]["exact"] for length in lengths]
        shown = [f"{cell['median']:.0%} ({cell['min']:.0%}–{cell['max']:.0%})" for cell in cells]
        size = f"{row['num_params']:,} | {row['train_flops']['median']:.2g}"
        lines.append(f"| {row['name']} | {size} | {' | '.join(shown)} |")
    return "\n".join(lines)
