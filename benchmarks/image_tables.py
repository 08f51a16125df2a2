"""The table of docs/images.md, from the record of the shapes world."""

from __future__ import annotations


def image_table(record: dict | None) -> str:
    """Return what was named and answered right on held-out combinations."""
    if record is None:
        return "Not measured yet."
    summary, chance = record["summary"], record["chance"]
    seeds = len(record["rows"])
    lines = [
        f"On combinations that no training image showed, {seeds} seed{'s' if seeds > 1 else ''} "
        f"({record['updates_scale']:g} of the script's full length, {record['images_a_combination']} images a combination):",
        "",
        "| | all right | colour | shape | size | place | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    attributes = ("colour", "shape", "size", "place")
    labels = {
        "clip": ("CLIP, one of 192 captions", "clip_all_templates", chance["clip"]),
        "projector": ("questions, projector trained", "projector_all", chance["questions"]),
        "decoder": ("questions, decoder trained too", "decoder_all", chance["questions"]),
    }
    for key, (label, whole, guess) in labels.items():
        cells = [percent(summary[whole]), *(percent(summary[f"{key}_{name}"]) for name in attributes), f"{100 * guess:.1f} %"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", f"With one sentence for a class in the place of four CLIP names {percent(summary['clip_one_template'])} right."]
    return "\n".join(lines)


def percent(values: dict) -> str:
    median = f"{100 * values['median']:.0f} %"
    return median if values["n"] == 1 else f"{median} ({100 * values['min']:.0f}–{100 * values['max']:.0f})"
