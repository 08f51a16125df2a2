"""The tables of docs/structured_output.md from its two records."""

from __future__ import annotations

from typing import Any


def strategy_table(record: dict[str, Any]) -> str:
    """Return the ways to a document, a line each."""
    lines = [
        f"{record['questions']} new questions, a model of 4 layers of 128 trained for it in "
        "`benchmarks/structured_strategies.py`, temperature 1:",
        "",
        "| way | valid | right | completions a question | tokens a question | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        valid, right = (f"{row[key] / row['n']:.0%}" for key in ("valid", "right"))
        lines.append(
            f"| {row['way']} | {valid} | {right} | {row['attempts']:.2f} | {row['completion_tokens']:.1f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def structured_tables(record: dict[str, Any]) -> str:
    """Return what is enforced, what it costs, and what hostile grammars get."""
    rows = record["rows"]
    lines = [
        f"Vocabulary of {record['vocab_size']:,}, one thread. The drawn schemas are ours, of the kinds and rare keywords of MaskBench "
        "(`benchmarks/schema_set.py`); the suite is the official one, whose schemas are exotic on purpose; the configuration "
        "files are those that check-jsonschema carries, without documents. First mask: from the schema's text, in "
        "milliseconds; later masks in microseconds.",
        "",
        "| schemas | mode | compiled | fully right | valid accepted | invalid rejected | first mask p50, p99 | mask p50, p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in [row for row in rows if row["part"] == "sets"]:
        right = "" if row["fully_right"] is None else f"{row['fully_right'] / row['schemas']:.1%}"
        documents = [f"{row[f'{kind} {done}']} / {row[kind]}" for kind, done in (("valid", "accepted"), ("invalid", "rejected"))]
        if row["fully_right"] is None:
            documents = ["", ""]
        masks = row["mask_us_p50_p90_p99_p999"]
        first, last = row["first_mask_ms_p50_p99_max"][:2]
        lines.append(
            f"| {row['set']} ({row['schemas']}) | {row['mode']} | {row['compiled'] / row['schemas']:.1%} | {right} | {documents[0]} "
            f"| {documents[1]} | {first:.1f}, {last:.1f} | {'' if masks is None else f'{masks[0]:.0f}, {masks[2]:.0f}'} |"
        )
    lines += [
        "",
        "| decoding, random weights, bf16 | white space | tokens/s free | tokens/s under a schema | cost |",
        "|---|---|---|---|---|",
    ]
    for row in [row for row in rows if row["part"] == "cost"]:
        lines.append(
            f"| {row['model']}, batch {row['batch']} | {row['whitespace']} | {row['unconstrained_tokens_per_s']:,.0f} "
            f"| {row['tokens_per_s']:,.0f} | {row['cost_percent']:.1f} % |"
        )
    hostile = [row for row in rows if row["part"] == "hostile"]
    slowest = max(hostile, key=lambda row: row["ms"])
    lines += [
        "",
        f"Of {len(hostile)} hostile grammars {sum(row['answer'] == 'error' for row in hostile)} are answered with an error and the rest "
        f"compiled; the slowest, {slowest['grammar']}, held its caller for {slowest['ms']:.0f} ms.",
    ]
    return "\n".join(lines)
