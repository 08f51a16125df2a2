"""The table of docs/reward_models.md."""

from __future__ import annotations

from typing import Any

NAMES = {
    "mean of three": "the mean of three reward models",
    "pretrained_0": "a reward model",
    "pretrained_1": "another seed",
    "pretrained_2": "another seed",
    "untrained_0": "one whose trunk has read nothing before",
    "words": "bag of words, neighbours included",
    "length": "length alone",
    "coin": "coin",
}


def reward_table(record: dict[str, Any]) -> str:
    """Return how often each judge is right, and what the report says."""
    reports = {row["name"]: row["report"] for row in record["rows"]}
    baselines = reports["pretrained_0"]["baselines"]
    scores = {name: report["accuracy"] for name, report in reports.items()} | {name: each["accuracy"] for name, each in baselines.items()}
    shape, calibration = record["shape"], reports["pretrained_0"]["calibration"]
    lines = [
        f"{record['training_pairs']:,} training pairs of the harmless part of hh-rlhf, {record['held_out_pairs']} held out; a decoder of "
        f"{shape['num_layers']} layers, {shape['hidden_size']} wide, context {record['context']}, which has read the training transcripts "
        f"{record['pretrain_epochs']:.0f} times and then is a reward model for one pass.",
        "",
        "| judge | right | 95 % interval |",
        "|---|---|---|",
    ]
    for name, label in NAMES.items():
        if name in scores:
            low, high = scores[name]["ci95"]
            lines.append(f"| {label} | {scores[name]['value']:.1%} | {low:.1%} to {high:.1%} |")
    ahead = reports["mean of three"]["baselines"]["words"]["ahead"]
    low, high = ahead["ci95"]
    lines += [
        "",
        f"The mean is {ahead['value']:+.1%} ahead of the bag of words, paired interval {low:+.1%} to {high:+.1%}: "
        + ("it is better." if low > 0 else "it is not shown to be better, and it is worse." if high < 0 else "not shown to be better.")
        + f" In the report's words: {reports['mean of three']['verdict']} A single model's calibration error is "
        f"{calibration['ece']:.3f}; the temperature {calibration['temperature']:.2f}, fitted on one half, takes the other's from "
        f"{calibration['rest']['ece']:.3f} to {calibration['rest']['ece_with_temperature']:.3f}.",
    ]
    return "\n".join(lines)
