"""What a build spent: time, energy and money by stage, and how the energy is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plinth.energy import JOULES_PER_KWH
from plinth.evaluation.build_files import BuildFiles, number, table


def spending(files: BuildFiles, stages: Mapping[str, Any], plan: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and joules of each stage, from the build's metrics.jsonl, and their totals, from its DONE or summed.

    Lines are {stage, time_s, energy_j, energy_source}; a stage that was resumed has several, which add up. A build that logs no
    stages leaves the training stages' own times. Returns {stages: [{name, time_s, energy_j, cost}], total_s, total_j, total_cost,
    total_co2_g, sources, predicted_j, predicted_source, price_per_hour, price_per_kwh, co2_g_per_kwh}; `sources` says how the
    joules are known, [] when none were recorded.
    """
    telemetry = table(files.json("config.json", "configuration of the build", quiet=True).get("telemetry"))
    price = number(telemetry.get("price_per_hour")) or number(table(plan.get("config")).get("price_per_hour")) or None
    kwh_price, co2_g_per_kwh = number(telemetry.get("price_per_kwh")), number(telemetry.get("co2_g_per_kwh"))
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
            {
                "name": name,
                "time_s": entry["time_s"],
                "energy_j": entry["energy_j"],
                "cost": _cost(entry["time_s"], price, entry["energy_j"], kwh_price),
            }
            for name, entry in entries.items()
        ],
        "complete": complete,
        "total_s": total_s,
        "total_j": total_j,
        "total_cost": _cost(total_s, price, total_j, kwh_price),
        "total_co2_g": total_j / JOULES_PER_KWH * co2_g_per_kwh if total_j is not None and co2_g_per_kwh is not None else None,
        "co2_g_per_kwh": co2_g_per_kwh,
        "price_per_kwh": kwh_price,
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


def _cost(seconds: float | None, price_per_hour: float | None, joules: float | None, price_per_kwh: float | None) -> float | None:
    """Return hours and kWh at their prices; None without a price, or where what a price is for is not known."""
    priced = [(seconds, price_per_hour, 3600.0), (joules, price_per_kwh, JOULES_PER_KWH)]
    parts = [(amount, price, unit) for amount, price, unit in priced if price]
    if not parts or any(amount is None for amount, _, _ in parts):
        return None
    return sum(amount / unit * price for amount, price, unit in parts)
