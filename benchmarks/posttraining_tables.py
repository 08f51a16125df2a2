"""The tables of docs/sft.md."""

from __future__ import annotations

from record import threads_of

TASKS = {"sft": "SFT", "dpo": "DPO", "reward": "reward model", "grpo": "GRPO, 8 completions"}
SETTINGS = {"float32": "same, fp32", "bfloat16": "same, bf16", "defaults": "each side's defaults"}
NAMES = {"trl": "TRL", "transformers": "plain loop"}


def batches_table(record: dict) -> str:
    """Return what each way of putting conversations into batches gives, in tokens a second of one core."""
    ways = list(record["rows"][0]["tokens_per_s"])
    lines = [
        "| model | conversations an update | " + " | ".join(f"{way}, tokens/s (filled)" for way in ways) + " |",
        "|---|---|" + "---|" * len(ways),
    ]
    for row in record["rows"]:
        cells = []
        for way in ways:
            ratio = f", {row['over_padded'][way]['median']:.2f}×" if way in row["over_padded"] else ""
            cells.append(f"{row['tokens_per_s'][way]['median']:,.0f} ({row['fill'][way]:.0%}){ratio}")
        lines.append(f"| {row['model']}, {row['dtype']} | {row['conversations_per_step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peers_table(record: dict) -> str:
    """Return seconds an example and peak memory of each side, and our part of theirs."""
    lines = [
        "| task | settings | side | seconds an example | Plinth's part of it | of its processor time | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    order = [(task, settings) for task in TASKS for settings in SETTINGS]
    for row in sorted(record["rows"], key=lambda row: order.index((row["task"], row["settings"]))):
        for side, found in row["sides"].items():
            parts = ["", ""]
            if side != "plinth":
                parts = [f"{row[key][side]['median']:.2f}× ({row[key][side]['min']:.2f}–{row[key][side]['max']:.2f})" for key in KEYS]
            name = NAMES.get(side, "Plinth")
            seconds, memory = found["seconds_per_example"]["median"], found["peak_memory_bytes"] / 1e9
            what = f"{TASKS[row['task']]} | {SETTINGS[row['settings']]} | {name}"
            lines.append(f"| {what} | {seconds:.3f} | {parts[0]} | {parts[1]} | {memory:.2f} GB |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions_of_peers"].items())
    hardware = record["hardware"]
    return "\n".join(
        [*lines, "", f"{versions}; {threads_of(record['rows'][0])} of {hardware['cpu']}; data: {record['data']}; {record['date']}."]
    )


def templates_table(record: dict) -> str:
    """Return by how many published chat templates each side learns what it should."""
    asked = {
        "answers": "each answer is learnt, and nothing of another turn",
        "ends": "with a token that ends generation",
        "stops": "and nothing behind that token",
        "prompts": "each behind the very tokens of its prompt",
    }
    both = [row for row in record["rows"] if row["trl"] is not None]
    lines = [
        f"| by how many templates | Plinth, of {len(record['rows'])} | Plinth, of {len(both)} | TRL's versions of these {len(both)} |",
        "|---|---|---|---|",
    ]
    for key, what in asked.items():
        plinth = [sum(bool(row["plinth"] and row["plinth"][key]) for row in rows) for rows in (record["rows"], both)]
        lines.append(f"| {what} | {plinth[0]} | {plinth[1]} | {sum(bool(row['trl'].get(key)) for row in both)} |")
    refused = [row["template"] for row in record["rows"] if "refused" in row]
    begun = [row["template"] for row in record["rows"] if row["plinth"] and not row["plinth"]["prompts"]]
    return "\n".join(
        [
            *lines,
            "",
            f"Refused, as they take no plain text: {', '.join(refused)}. Prompts that begin reasoning, which a plain answer lacks: "
            f"{', '.join(begun)}. TRL {record['versions_of_peers']['trl']}, {record['date']}.",
        ]
    )


KEYS = ("ours_over", "processor_ours_over")
