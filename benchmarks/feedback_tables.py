"""The tables of docs/ai_feedback.md and docs/distillation.md, from the records of best_of_n.py and distillation.py."""

from __future__ import annotations


def best_of_table(record: dict) -> str:
    """Return what each student keeps of the gain of the best of n."""
    lines = [
        "| finetuned on | gold reward | best of n before | share of the gain kept | each seed | nats from the start (best of n) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        name = {"control": "as many answers that nobody chose"}.get(row["name"], row["name"].replace("_", " "))
        share = row.get("share_kept")
        kept = "" if share is None else "{:.0%} ({:.0%}–{:.0%})".format(share["value"], *share["ci95"])
        seeds = ", ".join(f"{value:.0%}" for value in row.get("shares_by_seed", []))
        best = f"{row['best_of_n_reward']:.3f}" if "best_of_n_reward" in row else ""
        nats = f"{row['kl_nats']:.2f}" if "kl_nats" in row else ""
        nats += f" ({row['best_of_n_kl_nats']:.2f})" if "best_of_n_kl_nats" in row else ""
        lines.append(f"| {name} | {row['reward']:.3f} | {best} | {kept} | {seeds} | {nats} |")
    return "\n".join(lines)


def distillation_table(record: dict) -> str:
    """Return what each student learnt, and what the loss holds in memory."""
    lines = [
        "| loss | KL(teacher ‖ student) | cross-entropy | same first choice | own answers: nats from the teacher |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        cells = f"{row['kl_nats']:.3f} | {row['cross_entropy_nats']:.3f} | {row['same_first_choice']:.1%} | {row['own_kl_nats']:.2f}"
        lines.append(f"| {row['name']} | {cells} |")
    whole, chunks = record["memory"]
    lines += [
        "",
        f"A student of one layer on {record['rows_of_data']} conversations, {record['steps']} updates each from the student before, "
        f"held-out conversations; the teacher's own cross-entropy there is {record['rows'][0]['teacher_cross_entropy_nats']:.3f}. KL and "
        "cross-entropy are nats a token, the last column nats a whole answer that the student wrote.",
        "",
        f"The loss and its gradient for 1,024 positions and 32,768 tokens, a table of {whole['one_table_bytes'] / 1e6:.0f} MB: "
        f"{whole['peak_bytes'] / 1e6:.0f} MB at most with whole logits, {chunks['peak_bytes'] / 1e6:.0f} MB in chunks, the gradient "
        f"of the output matrix among them; {whole['time_s']:.2f} s and {chunks['time_s']:.2f} s on one core.",
    ]
    return "\n".join(lines)
