"""The tables of docs/mixture_of_experts.md, from the records of moe_grouped.py and moe_equal_active.py."""

from __future__ import annotations


def grouped_table(record: dict) -> str:
    """Return processor time by shape, dtype and way to compute."""
    columns = list(dict.fromkeys((row["shape"], row["dtype"]) for row in record["rows"]))
    times = {(row["side"], row["shape"], row["dtype"]): row["cpu_milliseconds"]["median"] for row in record["rows"]}
    lines = [
        "| milliseconds | " + " | ".join(f"{shape}, {dtype}" for shape, dtype in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for side in dict.fromkeys(row["side"] for row in record["rows"]):
        lines.append(f"| {side} | " + " | ".join(f"{times[side, *column]:.0f}" for column in columns) + " |")
    count = record["rows"][0]["cpu_milliseconds"]["n"]
    lines += ["", f"Processor time of a forward and backward pass of one layer, medians of {count} rounds ({record['hardware']['cpu']})."]
    return "\n".join(lines)


def equal_active_table(record: dict) -> str:
    """Return loss and speed of the dense decoder and of the one with experts."""
    lines = [
        "| | parameters | active | operations a token | bits a byte, held out | tokens/s here | load entropy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        bits, rate, entropy = row["bits_per_byte"], row["tokens_per_s"]["median"], row["load_entropy"]
        shown = "" if entropy is None else f"{entropy['median']:.3f}"
        lines.append(
            f"| {row['model']} | {row['params']:,} | {row['active_params']:,} | {row['train_flops_per_token'] / 1e6:.2f} M "
            f"| {bits['median']:.3f} ({bits['min']:.3f}–{bits['max']:.3f}) | {rate:,.0f} | {shown} |"
        )
    gain, tokens = record["bits_per_byte_gained_by_seed"], record["steps"] * record["tokens_per_step"]
    lines += [
        "",
        f"{gain['n']} seeds, {tokens / 1e6:.1f} M tokens each; the experts gain {gain['median']:.3f} bits a byte "
        f"({gain['min']:.3f} to {gain['max']:.3f} by seed). Other work ran on the machine: the rates compare the two, no more.",
    ]
    return "\n".join(lines)
