"""The tables of docs/preference.md."""

from __future__ import annotations

from typing import Any

from record import threads_of


def preference_table(record: dict[str, Any]) -> str:
    """Return the methods by what their answers are worth, with the KL and the length that it cost."""
    lines = [
        f"{record['prompts']} held-out prompts with {record['answers_per_prompt']} answers each; {record['epochs']:g} passes over the "
        f"pairs, {record['pairs_per_step']} an update, equal rates, {record['time_s'] / 60:.0f} minutes with {threads_of(record)} "
        "in all.",
        "",
        "| method | gold reward | 95 % interval | best at this KL | KL, nats | tokens | wins against SFT | 95 % interval | chosen fell |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        (low, high), (few, many) = row["reward_ci95"], row["wins_ci95"]
        tokens = "" if row["tokens"] is None else f"{row['tokens']:.1f}"
        fell = row.get("trained", {}).get("chosen_fell")
        wins = ("", "") if row["name"] == "SFT" else (f"{row['wins']:.0%}", f"{few:.0%} to {many:.0%}")
        lines.append(
            f"| {row['name']} | {row['reward']:.3f} | {low:.3f} to {high:.3f} | {row['optimum_at_kl']:.3f} | {row['kl_nats']:.2f} | "
            f"{tokens} | {wins[0]} | {wins[1]} | {'' if fell is None else f'{fell:.0%}'} |"
        )
    return "\n".join(lines)


def shared_prefix_table(record: dict[str, Any]) -> str:
    """Return what computing a pair's prompt once saves, by the lengths of prompt and answers."""
    lines = [
        "| computed in | prompt and answer, tokens | tokens, of the separate rows' | time, of theirs |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['dtype']} | {row['prompt']} and {row['answer']} | {row['token_share']:.2f} | {row['time_share']['median']:.2f} |"
        )
    return "\n".join(lines)
