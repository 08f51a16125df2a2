"""Everything that the report of a build shows, as one plain dictionary: what --json prints and the page is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plinth.config import UserError
from plinth.evaluation import verdict
from plinth.evaluation.build_files import NAMES, STAGES, BuildFiles, number, table
from plinth.evaluation.charts import thin
from plinth.evaluation.corpus_section import composition, funnel
from plinth.evaluation.lineage import lineage
from plinth.evaluation.plan_section import median_of, plan_section
from plinth.evaluation.segmentation import describe_tokenizer
from plinth.evaluation.spending import spending


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
    differences = verdict.paired_differences(files)
    plan = files.json("plan.json", "plan")
    done = files.json("DONE", "summary of the build", quiet=True)
    spent = spending(files, stages, plan, done)
    _say_missing_stages(files, stages, config)
    records = {"build": provenance, **{name: stage["provenance"] for name, stage in stages.items()}}
    data = {
        "name": build_dir.resolve().name,
        "path": str(build_dir),
        "created": provenance.get("created"),
        "state": _build_state(build_dir),
        "served": served,
        "model": _model(plan, stages, served),
        "total_s": spent["total_s"],
        "evaluation": evaluation,
        "goals": found,
        "improvements": verdict.improvements(evaluation, differences),
        "differences": differences,
        "samples": verdict.sample_answers(files, evaluation["stages"]),
        "funnel": funnel(corpus),
        "composition": composition(corpus, files.json("shards/manifest.json", "token counts")),
        "tokenizer": describe_tokenizer(files),
        "plan": plan_section(plan, stages, evaluation, spent),
        "stages": {name: _stage_section(stage) for name, stage in stages.items()},
        "curves": {name: curve(stage["metrics"]) for name, stage in stages.items()},
        "spent": spent,
        "lineage": lineage(files, stages, corpus),
        "provenance": {name: _provenance(record) for name, record in records.items() if record},
        "config": config,
    }
    data["verdict"] = verdict.sentence(evaluation, found, _size_words(data["model"]))
    data["missing"] = files.gaps
    return data


def _check(build_dir: Path) -> None:
    if not build_dir.is_dir():
        raise UserError(f"{build_dir} is not a directory. Name the directory of a build or of a run, which a plinth verb wrote with --out.")
    wanted = ("provenance.json", "plan.json", "corpus", "pretrain", "evals")
    if not any((build_dir / name).exists() for name in wanted):
        raise UserError(
            f"{build_dir} holds neither a build (none of {', '.join(wanted)}) nor a run. "
            "Name a directory that a plinth verb wrote with --out."
        )


def _build_state(build_dir: Path) -> str:
    failed = build_dir / "FAILED.txt"
    if failed.exists():
        return "failed: " + failed.read_text(encoding="utf-8", errors="replace").strip()
    return "done"


def _say_missing_stages(files: BuildFiles, stages: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for name, stage in stages.items():
        if stage["state"] == "not run":
            why = "Pretraining has not run." if name == "pretrain" else "The stage has not run."
            own_facts = (files.path / "facts").exists()
            if name == "sft" and not own_facts and not config.get("sft"):
                why = "There was no instruction data (--sft was not given), so the build stopped after pretraining."
            if name == "dpo" and stages["sft"]["state"] == "not run":
                why = "Preference tuning starts from an SFT model, and there is none."
            elif name == "dpo" and not own_facts and not config.get("pairs"):
                why = "There were no preference pairs (--pairs was not given), so the build stopped after SFT."
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


def _stage_section(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "state": stage["state"],
        "summary": stage["summary"],
        "median_tokens_per_s": median_of(stage["metrics"], "tokens_per_s"),
        "median_mfu": median_of(stage["metrics"], "mfu"),
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
