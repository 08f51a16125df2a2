"""What a build spent: time, energy and money by stage, and how the energy is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plinth.evaluation.build_files import BuildFiles, number, table


def spending(files: BuildFiles, stages: Mapping[str, Any], plan: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and joules of each stage, from the build's metrics.jsonl, and their totals, from its DONE or summed.

    Lines are {stage, time_s, energy_j, energy_source}; a stage that was resumed has several, which add up. A build that logs no
    stages leaves the training stages' own times. Returns {stages: [{name, time_s, energy_j, cost}], total_s, total_j, total_cost,
    sources, predicted_j, predicted_source, price_per_hour}; `sources` says how the joules are known, [] when none were recorded.
    """
    price = number(table(plan.get("config")).get("price_per_hour")) or None
    entries = _logged(files)
    complete = bool(entries)
    if not complete:
        files.say("time of the other stages", "metrics.jsonl of the build names no stages; only the training stages' own times are known.")
        entries = {
            name: {"time_s": number(stage["summary"].get("time_s")), "energy_j": number(stage["summary"].get("energy_j"))}
            | {"sources": [stage["summary"].get("energy_source")]}
            for name, stage in stages.items()
            if number(stage["summary"].get("time_s")) is not None
        }
    total_s = number(done.get("time_s")) or (_sum(entries, "time_s") if complete else None)
    total_j = number(done.get("energy_j")) or (_sum(entries, "energy_j") if complete else None)
    known = [source for entry in entries.values() if entry["energy_j"] is not None for source in entry["sources"]]
    return {
        "stages": [
            {"name": name, "time_s": entry["time_s"], "energy_j": entry["energy_j"], "cost": _cost(entry["time_s"], price)}
            for name, entry in entries.items()
        ],
        "complete": complete,
        "total_s": total_s,
        "total_j": total_j,
        "total_cost": _cost(total_s, price),
        "sources": list(dict.fromkeys(str(source or "source not recorded") for source in known)),
        "predicted_j": number(table(plan.get("predicted")).get("total_energy_j")),
        "predicted_source": str(table(plan.get("sources")).get("energy_j") or "the plan"),
        "price_per_hour": price,
    }


def _logged(files: BuildFiles) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for record in files.json_lines("metrics.jsonl"):
        seconds, joules = number(record.get("time_s")), number(record.get("energy_j"))
        if not record.get("stage") or seconds is None:
            continue
        entry = entries.setdefault(str(record["stage"]), {"time_s": 0.0, "energy_j": None, "sources": []})
        entry["time_s"] += seconds
        if joules is not None:
            entry["energy_j"] = (entry["energy_j"] or 0.0) + joules
            entry["sources"].append(record.get("energy_source"))
    return entries


def _sum(entries: Mapping[str, Mapping[str, Any]], key: str) -> float | None:
    values = [entry[key] for entry in entries.values() if entry[key] is not None]
    return math.fsum(values) if values else None


def _cost(seconds: float | None, price_per_hour: float | None) -> float | None:
    return seconds / 3600 * price_per_hour if seconds is not None and price_per_hour else None
