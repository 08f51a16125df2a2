"""The table of docs/translation.md, from its record."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent / "records" / "translation.json"


def translation_table() -> str:
    """Return what each encoder-decoder learnt, one row a model and data set."""
    record = json.loads(RECORD.read_text())
    lines = [
        f"`benchmarks/translation.py`, {record['hardware']['cpu']}, while other work ran on the machine: tokens/s are a lower bound.",
        "",
        "| model | data | parameters | pairs × epochs | target tokens/s | held-out loss, nats a token (frequencies alone) | exact, 4 beams "
        "| BLEU greedy | BLEU 4 beams (95 %) | chrF 4 beams |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        low, high = row["beams_bleu_ci95"]
        is_word = row["data"] == "numerals"  # a translation of one word has no four words in a row, which BLEU counts
        bleu = ("—", "—") if is_word else (f"{row['greedy_bleu']:.1f}", f"{row['beams_bleu']:.1f} ({low:.1f}–{high:.1f})")
        lines.append(
            f"| {row['family']} | {row['data']} | {row['num_params'] / 1e6:.2f} M | {row['pairs']:,} × {row['epochs']:.0f} "
            f"| {row['target_tokens_per_s']:,.0f} | {row['heldout_nats']:.3f} ({row['heldout_unigram_nats']:.2f}) "
            f"| {row['beams_exact']:.0%} of {row['sentences']:,} | {bleu[0]} | {bleu[1]} | {row['beams_chrf']:.1f} |"
        )
    return "\n".join(lines)
