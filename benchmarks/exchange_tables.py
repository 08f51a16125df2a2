"""The table of docs/exchange.md, from the record of import_speed.py."""

from __future__ import annotations

from typing import Any


def import_table(record: dict[str, Any]) -> str:
    """Return time, processor time and memory of each way, for a checkpoint of the record's size."""
    lines = ["| a checkpoint of " + f"{record['weights_bytes'] / 1e6:.0f} MB in fp32 | time | of it on the processor | peak memory |"]
    lines.append("|---|---|---|---|")
    for row in record["rows"]:
        memory = f"{row['peak_share_of_weights']['max']:.2f} × the weights"
        lines.append(f"| {row['way']} | {row['time_s']['median']:.1f} s | {row['cpu_s']['median']:.1f} s | {memory} |")
    rounds = record["rows"][0]["time_s"]["n"]
    return "\n".join(
        [
            *lines,
            "",
            f"Files from the disk, not from the cache; rounds, in alternation: {rounds}; the median time and the largest peak, "
            f"on a machine that was busy with other work ({record['hardware']['cpu']}, "
            f"{record['hardware']['cores']} cores): the times there are upper bounds.",
        ]
    )
