"""Everything that the report of a build shows, as one plain dictionary: what --json prints and the page is drawn from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plinth.config import UserError
from plinth.evaluation import verdict
from plinth.evaluation.build_files import NAMES, STAGES, BuildFiles, number, rows, table
from plinth.evaluation.charts import thin
from plinth.evaluation.lineage import lineage
from plinth.evaluation.segmentation import describe_tokenizer

PLAN_ROWS = (
    ("loss_nats", "Held-out loss", "nats per token"),
    ("bpb", "Held-out bits per byte", "bits"),
    ("tokens", "Training tokens", "count"),
    ("time_s", "Time of pretraining", "s"),
    ("tokens_per_s", "Training speed", "tokens per s"),
    ("memory_bytes", "Peak memory", "bytes"),
    ("energy_j", "Energy of pretraining", "J"),
    ("cost", "Cost of pretraining", "money"),
)


def report_data(build_dir: Path) -> dict[str, Any]:
    """Gather what the files of a build say, without writing anything.

    Whatever is missing or damaged is listed under 'missing' as {what, why}. Raises UserError when the directory does not exist or
    holds nothing that a build writes.
    """
    build_dir = Path(build_dir)
    _check(build_dir)
    files = BuildFiles(build_dir)
    config = files.json("config.json", "configuration of the build")
    provenance = files.json("provenance.json", "provenance of the build")
    stages = {name: files.stage(name) for name in STAGES}
    served = next((name for name in reversed(STAGES) if stages[name]["state"] == "done"), None)
    corpus = files.json("corpus/manifest.json", "data funnel and composition")
    evaluation = verdict.evaluation_table(files)
    found = verdict.goals(evaluation, served)
    plan = files.json("plan.json", "plan")
    done = files.json("DONE", "summary of the build", quiet=True)
    times = stage_times(files, stages, done)
    _say_missing_stages(files, stages)
    records = {"build": provenance, **{name: stage["provenance"] for name, stage in stages.items()}}
    data = {
        "name": build_dir.resolve().name,
        "path": str(build_dir),
        "created": provenance.get("created"),
        "state": _build_state(build_dir),
        "served": served,
        "model": _model(plan, stages, served),
        "total_s": times["total_s"],
        "evaluation": evaluation,
        "goals": found,
        "improvements": verdict.improvements(evaluation),
        "samples": verdict.sample_answers(files, evaluation["stages"]),
        "funnel": funnel(corpus),
        "composition": composition(corpus, files.json("shards/manifest.json", "token counts")),
        "tokenizer": describe_tokenizer(files),
        "plan": plan_section(plan, stages["pretrain"], evaluation),
        "stages": {name: _stage_section(stage) for name, stage in stages.items()},
        "curves": {name: curve(stage["metrics"]) for name, stage in stages.items()},
        "time": times,
        "energy": energy(stages, plan, done),
        "lineage": lineage(files, stages, corpus),
        "provenance": {name: _provenance(record) for name, record in records.items() if record},
        "config": config,
    }
    data["verdict"] = verdict.sentence(evaluation, found, _size_words(data["model"]))
    data["missing"] = files.gaps
    return data


def _check(build_dir: Path) -> None:
    if not build_dir.is_dir():
        raise UserError(f"{build_dir} is not a directory. Name the directory that `plinth build --out` wrote.")
    wanted = ("provenance.json", "plan.json", "corpus", "pretrain", "evals")
    if not any((build_dir / name).exists() for name in wanted):
        raise UserError(f"{build_dir} holds no build (none of {', '.join(wanted)}). Name the directory that `plinth build --out` wrote.")


def _build_state(build_dir: Path) -> str:
    failed = build_dir / "FAILED.txt"
    if failed.exists():
        return "failed: " + failed.read_text(encoding="utf-8", errors="replace").strip()
    return "done"


def _say_missing_stages(files: BuildFiles, stages: Mapping[str, Any]) -> None:
    for name, stage in stages.items():
        if stage["state"] == "not run":
            why = "Pretraining has not run." if name == "pretrain" else "The stage has not run."
            if name == "sft" and not (files.path / "facts").exists():
                why = "There was no instruction data (--sft was not given), so the build stopped after pretraining."
            if name == "dpo" and stages["sft"]["state"] == "not run":
                why = "Preference tuning starts from an SFT model, and there is none."
            files.say(NAMES[name], why)
        elif stage["state"] != "done":
            files.say(NAMES[name], f"The stage did not finish: {stage['state']}.")


def _provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with every field that the page names, so that one that was not written is seen to be absent."""
    expected = {"argv": [], "created": "", "seed": None, "hardware": {}, "versions": {}}
    return {**expected, **{key: value for key, value in record.items() if value is not None}}


def _model(plan: Mapping[str, Any], stages: Mapping[str, Any], served: str | None) -> dict[str, Any]:
    """The served model's shape and its number of parameters, from the run's own files before the plan's."""
    summary = stages[served]["summary"] if served else {}
    shape = table(plan.get("model"))
    parameters = summary.get("num_params") or stages["pretrain"]["summary"].get("num_params") or plan.get("num_params")
    return {"num_params": number(parameters), "shape": shape}


def _size_words(model: Mapping[str, Any]) -> str:
    count = model["num_params"]
    if not count:
        return "A decoder"
    return f"A decoder of {count / 1e6:.1f} million parameters" if count < 1e9 else f"A decoder of {count / 1e9:.2f} billion parameters"


def funnel(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """Documents that were left after each gate: [{label, documents, dropped, examples}], from documents read to the two splits."""
    if not corpus:
        return {}
    gates = []
    if isinstance(corpus.get("documents_in"), int):
        gates.append({"label": "Documents read", "documents": corpus["documents_in"], "dropped": 0, "examples": []})
    for rule in map(table, rows(corpus.get("rules"))):
        label = str(rule.get("rule", "?")).replace("_", " ")
        gates.append(
            {"label": label, "documents": number(rule.get("kept")), "dropped": number(rule.get("dropped"))}
            | {"examples": [_example(table(example)) for example in rows(rule.get("examples"))][:5]}
        )
    splits = [
        {"label": label, "documents": number(corpus.get(f"documents_{split}")), "bytes": number(corpus.get(f"bytes_{split}"))}
        for split, label in (("train", "Training"), ("heldout", "Held out, never trained on"))
    ]
    rejected = [
        {"path": str(table(entry).get("path", "?")), "reason": str(table(entry).get("reason", entry))}
        for entry in rows(corpus.get("rejected_files"))
    ]
    return {"gates": gates, "splits": splits, "rejected": rejected[:20], "num_rejected": len(rejected)}


def _example(entry: Mapping[str, Any]) -> dict[str, str]:
    return {
        "source": str(entry.get("source") or "source unknown"),
        "reason": str(entry.get("reason") or ""),
        "excerpt": str(entry.get("excerpt") or "")[:600],
    }


def composition(corpus: Mapping[str, Any], shards: Mapping[str, Any]) -> dict[str, Any]:
    """Shares by kind (documents, bytes) and by licence, and the token counts of the shards."""
    kinds = [{"name": str(name), **_amount(value)} for name, value in table(corpus.get("composition")).items()]
    licences = [{"name": str(name) or "not stated", **_amount(value)} for name, value in table(corpus.get("licences")).items()]
    for entries in (kinds, licences):
        unit = "bytes" if any(entry["bytes"] for entry in entries) else "documents"
        total = sum(entry[unit] or 0 for entry in entries)
        for entry in entries:
            entry["share"] = (entry[unit] or 0) / total if total else 0.0
        entries.sort(key=lambda entry: -entry["share"])
    tokens = {split: number(shards.get(f"tokens_{split}")) for split in ("train", "heldout")}
    return {"kinds": kinds, "licences": licences, "tokens": tokens} if kinds or licences or any(tokens.values()) else {}


def _amount(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"documents": number(value.get("documents")), "bytes": number(value.get("bytes"))}
    return {"documents": number(value), "bytes": None}


def plan_section(plan: Mapping[str, Any], pretrain: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted against measured, and the law that each prediction came from."""
    if not plan:
        return {}
    predicted, sources, summary = table(plan.get("predicted")), table(plan.get("sources")), pretrain["summary"]
    heldout = {
        "loss_nats": verdict.cells_of(evaluation, "loss_nats").get("pretrain"),
        "bpb": verdict.cells_of(evaluation, "bits_per_byte").get("pretrain"),
    }
    found = []
    for key, label, unit in PLAN_ROWS:
        expected = number(predicted.get(key, plan.get(key)))
        cell = heldout.get(key)
        actual = number(summary.get("peak_memory_bytes" if key == "memory_bytes" else key))
        if key in heldout:  # the training loss is of other documents: it is no substitute
            actual = cell["value"] if cell else None
        if expected is None and actual is None:
            continue
        found.append(
            {"key": key, "label": label, "unit": unit, "predicted": expected, "measured": actual, "law": str(sources.get(key, ""))}
            | {"ci95": cell["ci95"] if cell else None, "ratio": actual / expected if actual is not None and expected else None}
        )
    choices = [
        {"key": key, "value": plan[key], "law": str(sources.get(key, ""))}
        for key in plan
        if isinstance(plan[key], (int, float, str)) and not isinstance(plan[key], bool) and key not in {row["key"] for row in found}
    ]
    return {"rows": found, "choices": choices, "model": table(plan.get("model")), "sources": sources, "alternatives": _alternatives(plan)}


def _alternatives(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The table of plans that were weighed and not taken: its columns and rows of plain values."""
    entries = [table(entry) for entry in rows(plan.get("alternatives"))]
    columns = list(dict.fromkeys(key for entry in entries for key, value in entry.items() if not isinstance(value, (dict, list))))
    return {"columns": columns, "rows": [[entry.get(column) for column in columns] for entry in entries]}


def _stage_section(stage: Mapping[str, Any]) -> dict[str, Any]:
    summary = stage["summary"]
    speeds = [value for value in (number(record.get("tokens_per_s")) for record in stage["metrics"]) if value]
    mfus = [value for value in (number(record.get("mfu")) for record in stage["metrics"]) if value]
    return {
        "state": stage["state"],
        "summary": summary,
        "median_tokens_per_s": statistics.median(speeds) if speeds else None,
        "median_mfu": statistics.median(mfus) if mfus else None,
    }


def curve(metrics: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Logged values by step, thinned for drawing: {name: {x, y}} for the loss, the learning rate and, of DPO, accuracy and margin."""
    found = {}
    for key in ("loss_nats", "heldout_loss_nats", "lr", "accuracy", "margin"):
        points = [(number(record.get("step")), number(record.get(key))) for record in metrics]
        points = [(x, y) for x, y in points if x is not None and y is not None]
        if points:
            x, y = thin([x for x, _ in points], [y for _, y in points])
            found[key] = {"x": x, "y": y}
    return found


def stage_times(files: BuildFiles, stages: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds by stage, from the build's metrics.jsonl ({stage, time_s} a line), else from the summaries of the training stages."""
    found: dict[str, float] = {}
    for record in files.json_lines("metrics.jsonl"):
        seconds = number(record.get("time_s"))
        if record.get("stage") and seconds is not None:
            found[str(record["stage"])] = found.get(str(record["stage"]), 0.0) + seconds
    complete = bool(found)
    if not complete:
        found = {name: number(stage["summary"].get("time_s")) or 0.0 for name, stage in stages.items() if stage["summary"].get("time_s")}
        files.say("time of the other stages", "metrics.jsonl of the build names no stages; only the training stages' own times are known.")
    total = number(done.get("time_s")) or (math.fsum(found.values()) if complete else None)
    return {"stages": [{"name": name, "time_s": value} for name, value in found.items()], "total_s": total, "complete": complete}


def energy(stages: Mapping[str, Any], plan: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """Joules and cost of each training stage, with how each number was come by: a meter, an estimate, or the plan's prediction."""
    entries = []
    for name, stage in stages.items():
        joules = number(stage["summary"].get("energy_j"))
        if joules is not None:
            source = str(stage["summary"].get("energy_source") or "source not recorded")
            entries.append({"name": NAMES[name], "energy_j": joules, "source": source, "cost": number(stage["summary"].get("cost"))})
    joules = number(done.get("energy_j"))
    if joules is not None:
        source = str(done.get("energy_source") or "source not recorded")
        entries.append({"name": "The whole build", "energy_j": joules, "source": source, "cost": number(done.get("cost"))})
    predicted = table(plan.get("predicted"))
    if not entries and number(predicted.get("energy_j")) is not None:
        law = str(table(plan.get("sources")).get("energy_j") or "the plan")
        entries.append(
            {"name": "Pretraining", "energy_j": number(predicted["energy_j"]), "source": f"not measured; predicted by {law}"}
            | {"cost": number(predicted.get("cost"))}
        )
    return {"entries": entries, "currency": str(plan.get("currency") or "")}
