"""The table of docs/adapters.md on adapters over a base of 4 bits, from the record of qlora_memory.py."""

from __future__ import annotations

PARTS = ("model", "masters", "optimizer")


def qlora_table(record: dict) -> str:
    """Return what each way holds and how long a step takes."""
    lines = [
        "| trained in bf16 | model | whole weights kept in fp32 | optimizer | in memory after a step | time of a step |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        held = " | ".join(f"{row[f'{part}_bytes'] / 1e6:,.0f} MB" for part in PARTS)
        lines.append(f"| {row['name']} | {held} | {row['resident_bytes'] / 1e6:,.0f} MB | {row['step_s']:.1f} s |")
    lines += [
        "",
        f"{record['rows'][0]['num_params'] / 1e6:.0f} M parameters ({record['layers']} × {record['width']}), rank 16, "
        f"{record['tokens_per_step']:,} tokens a step, one thread, the fastest of several steps ({record['hardware']['cpu']}). "
        "Memory is the process's, with PyTorch and the activations.",
    ]
    return "\n".join(lines)
