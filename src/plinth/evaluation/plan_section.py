"""The plan's part of a report: every prediction beside what came, with the law or measurement that it was made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from plinth.evaluation.build_files import number, rows, table
from plinth.evaluation.verdict import cells_of

QUANTITIES = (
    ("loss_nats", "Held-out loss, nats per token", ""),
    ("bpb", "Held-out bits per byte", ""),
    ("tokens", "Training tokens", ""),
    ("steps", "Steps", ""),
    ("time_s", "Time of pretraining", "s"),
    ("tokens_per_s", "Training speed, tokens per s", ""),
    ("mfu", "Share of the measured matrix rate", "share"),
    ("memory_bytes", "Peak memory", "bytes"),
    ("energy_j", "Energy of pretraining", "J"),
    ("cost", "Cost of pretraining", "money"),
    ("total_time_s", "Time of all training", "s"),
    ("total_energy_j", "Energy of all training", "J"),
)
ALIASES = {"total_time_s": "time_s", "total_energy_j": "energy_j"}  # whose law these share


def plan_section(
    plan: Mapping[str, Any], stages: Mapping[str, Any], evaluation: Mapping[str, Any], spent: Mapping[str, Any]
) -> dict[str, Any]:
    """Predicted against actual, the choices, what every law says, the alternatives and the doubts; {} without a plan.

    A quantity that is neither predicted nor measured is left out, and so is a cost when no price was given.
    """
    if not plan:
        return {}
    predicted, sources, config = table(plan.get("predicted")), table(plan.get("sources")), table(plan.get("config"))
    came = _actual(stages, evaluation, spent)
    found = []
    for key, label, unit in QUANTITIES:
        expected, actual = number(predicted.get(key, plan.get(key))), came[key]
        if (expected is None and actual is None) or (key == "cost" and not config.get("price_per_hour")):
            continue
        ratio = actual / expected if actual is not None and expected else None
        law = str(sources.get(key) or sources.get(ALIASES.get(key, "")) or "")
        how = "; ".join(spent["sources"]) if unit == "J" and actual is not None else ""
        found.append(
            {"key": key, "label": label, "unit": unit, "predicted": expected, "actual": actual, "ratio": ratio, "law": law, "how": how}
        )
    shown = {row["key"] for row in found}
    choices = [
        {"key": key, "value": value, "law": str(sources.get(key, ""))}
        for key, value in plan.items()
        if isinstance(value, (int, float, str)) and key not in shown
    ]
    return {
        "rows": found,
        "choices": choices,
        "model": table(plan.get("model")),
        "model_law": str(sources.get("model", "")),
        "laws": columns_and_rows(plan.get("laws")),
        "alternatives": columns_and_rows(plan.get("alternatives")),
        "warnings": [str(warning) for warning in rows(plan.get("warnings"))],
    }


def _actual(stages: Mapping[str, Any], evaluation: Mapping[str, Any], spent: Mapping[str, Any]) -> dict[str, float | None]:
    """What came of each quantity. Losses are those of held-out documents only: the training loss is no substitute."""
    pretrain = stages["pretrain"]["summary"]
    tokens, seconds = number(pretrain.get("tokens")), number(pretrain.get("time_s"))
    by_stage = {entry["name"]: entry for entry in spent["stages"]}
    loss, bits = (cells_of(evaluation, key).get("pretrain") for key in ("loss_nats", "bits_per_byte"))
    return {
        "loss_nats": loss["value"] if loss else None,
        "bpb": bits["value"] if bits else None,
        "tokens": tokens,
        "steps": number(pretrain.get("steps")),
        "time_s": seconds,
        "tokens_per_s": tokens / seconds if tokens and seconds else None,
        "mfu": median_of(stages["pretrain"]["metrics"], "mfu"),
        "memory_bytes": number(pretrain.get("peak_memory_bytes")),
        "energy_j": by_stage.get("pretrain", {}).get("energy_j"),
        "cost": by_stage.get("pretrain", {}).get("cost"),
        "total_time_s": _total(stages, by_stage, "time_s"),
        "total_energy_j": _total(stages, by_stage, "energy_j"),
    }


def _total(stages: Mapping[str, Any], by_stage: Mapping[str, Any], key: str) -> float | None:
    """The sum over the training stages that ran; None when one of them did not record it."""
    values = [by_stage.get(name, {}).get(key) for name, stage in stages.items() if stage["state"] != "not run"]
    return sum(value for value in values if value is not None) if values and None not in values else None


def median_of(metrics: list[dict[str, Any]], key: str) -> float | None:
    """The median of a logged field over the steps that have it."""
    values = [value for value in (number(record.get(key)) for record in metrics) if value]
    return statistics.median(values) if values else None


def columns_and_rows(value: Any) -> dict[str, Any]:
    """A list of records as a table of plain values: {columns, rows}."""
    entries = [table(entry) for entry in rows(value)]
    columns = list(dict.fromkeys(key for entry in entries for key, cell in entry.items() if not isinstance(cell, (dict, list))))
    return {"columns": columns, "rows": [[entry.get(column) for column in columns] for entry in entries]}
