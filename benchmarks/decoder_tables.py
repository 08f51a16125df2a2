"""The table of docs/models.md, from the record of decoder_speed.py."""

from __future__ import annotations


def decoder_speed_table(record: dict) -> str:
    """Return processor time by shape, work and side, and how many times as fast as each of theirs ours in bf16 is."""
    rows = record["rows"]
    columns = list(dict.fromkeys((row["shape"], row["work"]) for row in rows))
    times = {(row["side"], row["shape"], row["work"]): row["cpu_seconds"]["median"] for row in rows}
    lines = ["| milliseconds of the processor | " + " | ".join(f"{shape}, {work}" for shape, work in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for side in dict.fromkeys(row["side"] for row in rows):
        lines.append(f"| {side} | " + " | ".join(f"{1e3 * times[side, *column]:.0f}" for column in columns) + " |")
    for name in ("transformers bf16", "transformers fp32"):
        ratios = (times[name, *column] / times["Plinth bf16", *column] for column in columns)
        lines.append(f"| Plinth bf16 against {name} | " + " | ".join(f"{ratio:.2f} times" for ratio in ratios) + " |")
    count = rows[0]["cpu_seconds"]["n"]
    lines += ["", f"Medians of {count} rounds with {record['threads']} thread(s), transformers {record['transformers']}"
              f" ({record['hardware']['cpu']})."]  # fmt: skip
    return "\n".join(lines)
