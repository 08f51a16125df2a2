"""BASE | SFT | DPO side by side: which numbers moved beyond their intervals, which goals are met, and in one sentence.

A number counts as better or worse than another only when their two 95 % intervals do not overlap. That is stricter than a paired
test: a difference that is called "no clear difference" here may still be real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from plinth.evaluation.build_files import NAMES, STAGES, BuildFiles, number, rows, table

UP, DOWN = "higher is better", "lower is better"

# key in the evaluation file -> (heading, label, direction, how it is written)
LIKELIHOOD = {
    "loss_nats": ("Cross-entropy, nats per token", DOWN, "number"),
    "perplexity": ("Perplexity", DOWN, "number"),
    "bits_per_byte": ("Bits per byte", DOWN, "number"),
    "bits_per_char": ("Bits per character", DOWN, "number"),
}
QUESTIONS = {
    "known_exact": ("Known facts: right", UP, "share"),
    "known_f1": ("Known facts: token F1", UP, "share"),
    "consistency": ("Same answer to every phrasing", UP, "share"),
    "over_refusal": ("Known facts: refused", DOWN, "share"),
    "heldout_exact": ("Held-out facts: right", UP, "share"),
    "heldout_f1": ("Held-out facts: token F1", UP, "share"),
    "heldout_refusal": ("Held-out facts: refused", None, "share"),  # it was not taught them: both answers are honest
    "invented_refusal": ("Invented names: refused", UP, "share"),
    "invented_false": ("Invented names: false answer", DOWN, "share"),
    "accuracy_answered": ("Answers given: right", UP, "share"),
    "coverage": ("Questions answered at all", None, "share"),  # to answer what it cannot know is no gain
    "refusal_precision": ("Refusals: of what was not taught", UP, "share"),
    "refusal_recall": ("Not taught and not right: refused", UP, "share"),
    "auroc": ("Confidence tells right from wrong (AUROC)", UP, "number"),
    "ece": ("Confidence off the share right (ECE)", DOWN, "number"),
}
GOALS = (
    ("known_exact", "known facts answered right at unseen phrasings", "at least", 0.60),
    ("invented_false", "false answers on invented names", "at most", 0.20),
    ("over_refusal", "refusals of known facts", "at most", 0.10),
)


def evaluation_table(files: BuildFiles) -> dict[str, Any]:
    """Rows of scores by stage, each marked against BASE, from evals/{pretrain,sft,dpo}.json.

    Returns {stages, groups: [{heading, rows: [{key, label, direction, format, cells: {stage: cell}}]}], protocol: {stage: ...}};
    a cell is {value, n, stderr, ci95, against_base} or None where the stage has no such number.
    """
    results = {stage: files.json(f"evals/{stage}.json", f"evaluation of {NAMES[stage]}", quiet=stage != "pretrain") for stage in STAGES}
    stages = [stage for stage in STAGES if results[stage]]
    groups = []
    for heading, section, known in (("Held-out documents", "likelihood", LIKELIHOOD), ("Questions", "questions", QUESTIONS)):
        scores = {stage: table(results[stage].get(section)) for stage in stages}
        extra = {key: (key.replace("_", " "), None, "number") for key in _score_keys(scores) if key not in known}
        group = [
            _row(key, label, direction, style, {stage: read_score(scores[stage].get(key)) for stage in stages})
            for key, (label, direction, style) in {**known, **extra}.items()
        ]
        group = [row for row in group if any(row["cells"].values())]
        if group:
            groups.append({"heading": heading, "rows": group})
    by_kind = _by_kind({stage: table(results[stage].get("questions_by_kind")) for stage in stages})
    protocol = {stage: _protocol(results[stage]) for stage in stages}
    models = {stage: results[stage].get("model") for stage in stages}
    return {"stages": stages, "groups": groups, "by_kind": by_kind, "protocol": protocol, "models": models}


def _by_kind(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores that goals are set on, for each kind of question, as groups of rows."""
    kinds = list(dict.fromkeys(kind for scores in results.values() for kind in scores))
    groups = []
    for key in [key for key, *_ in GOALS] + ["heldout_exact"]:
        label, direction, style = QUESTIONS[key]
        cells = {kind: {stage: read_score(table(scores.get(kind)).get(key)) for stage, scores in results.items()} for kind in kinds}
        found = [_row(key, str(kind), direction, style, row) for kind, row in cells.items() if any(row.values())]
        if found:
            groups.append({"heading": label, "rows": found})
    return groups


def _score_keys(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for section in scores.values() for key, value in section.items() if read_score(value)))


def _protocol(result: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol of the file, and those of its scores that add something to it."""
    protocol = dict(table(result.get("protocol")))
    for section in ("likelihood", "questions"):
        for key, value in table(result.get(section)).items():
            own = table(table(value).get("protocol"))
            if own and own not in protocol.values():
                protocol[f"{section}.{key}"] = own
    return protocol


def read_score(value: Any) -> dict[str, Any] | None:
    """A Score as written to JSON, reduced to {value, n, stderr, ci95}; None for anything else."""
    score = table(value)
    if number(score.get("value")) is None:
        return None
    ends = [number(end) for end in rows(score.get("ci95"))]
    ci95 = ends if len(ends) == 2 and None not in ends else None
    return {"value": number(score["value"]), "n": score.get("n"), "stderr": number(score.get("stderr")), "ci95": ci95}


def compare(cell: dict[str, Any] | None, base: dict[str, Any] | None, direction: str | None) -> str | None:
    """'better', 'worse', or 'unclear' when the intervals overlap; None without two intervals or without a direction."""
    if not cell or not base or not cell["ci95"] or not base["ci95"] or direction is None:
        return None
    if cell["ci95"][0] > base["ci95"][1]:
        return "better" if direction == UP else "worse"
    if cell["ci95"][1] < base["ci95"][0]:
        return "better" if direction == DOWN else "worse"
    return "unclear"


def _row(key: str, label: str, direction: str | None, style: str, cells: dict[str, Any]) -> dict[str, Any]:
    for stage, cell in cells.items():
        if cell:
            cell["against_base"] = None if stage == "pretrain" else compare(cell, cells.get("pretrain"), direction)
    return {"key": key, "label": label, "direction": direction, "format": style, "cells": cells}


def cells_of(evaluation: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The cells of one row of `evaluation_table`, {} when it has no such row."""
    return next((row["cells"] for group in evaluation["groups"] for row in group["rows"] if row["key"] == key), {})


def goals(evaluation: Mapping[str, Any], served: str | None) -> list[dict[str, Any]]:
    """The three goals for the served model, then the two improvements that alignment is for, each met or missed.

    `met` is None where the numbers are missing. `clear` says whether the interval lies on one side of the goal.
    """
    found = []
    for key, label, side, goal in GOALS:
        cell = cells_of(evaluation, key).get(served)
        entry = {"key": key, "label": label, "side": side, "goal": goal, "stage": served, "cell": cell, "met": None, "clear": None}
        if cell:
            entry["met"] = cell["value"] >= goal if side == "at least" else cell["value"] <= goal
            entry["clear"] = bool(cell["ci95"]) and not cell["ci95"][0] < goal < cell["ci95"][1]
        found.append(entry)
    return found


def paired_differences(files: BuildFiles) -> list[dict[str, Any]]:
    """Differences over the same questions, from evals/differences.json: [{pair, key, label, cell}].

    They can be clear where the two intervals overlap, since what makes a question hard is hard for both models.
    """
    found = []
    for pair, scores in files.json("evals/differences.json", "paired differences", quiet=True).items():
        names = [NAMES.get(stage, stage) for stage in str(pair).split(" - ")]
        for key, value in table(scores).items():
            cell = read_score(value)
            if cell and len(names) == 2:
                label = QUESTIONS[key][0] if key in QUESTIONS else key.replace("_", " ")
                found.append({"pair": str(pair), "names": names, "key": key, "label": label, "cell": cell})
    return found


def _paired(differences: list[dict[str, Any]], stage: str, other: str, key: str) -> dict[str, Any] | None:
    """The paired difference of one score; that of false answers is minus that of refusals."""
    sign = -1.0 if key == "invented_false" else 1.0
    wanted = "invented_refusal" if key == "invented_false" else key
    for entry in differences:
        if entry["pair"] == f"{stage} - {other}" and entry["key"] == wanted and entry["cell"]["ci95"]:
            ends = sorted(sign * end for end in entry["cell"]["ci95"])
            return {"value": sign * entry["cell"]["value"], "n": entry["cell"]["n"], "ci95": ends}
    return None


def improvements(evaluation: Mapping[str, Any], differences: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons that alignment is for: known facts against BASE, and false answers from SFT to DPO.

    `outcome` compares the two intervals; `shown` is also true where they overlap and the difference on the same questions is clear.
    """
    wanted = [
        ("known_exact", "more known facts right than BASE", "sft", "pretrain", UP),
        ("known_exact", "more known facts right than BASE", "dpo", "pretrain", UP),
        ("invented_false", "fewer false answers on invented names than SFT", "dpo", "sft", DOWN),
    ]
    found = []
    for key, label, stage, other, direction in wanted:
        cells = cells_of(evaluation, key)
        outcome = compare(cells.get(stage), cells.get(other), direction)
        if outcome:
            paired = _paired(differences, stage, other, key)
            found.append(
                {"key": key, "label": label, "stage": stage, "other": other, "outcome": outcome}
                | {"shown": outcome == "better" or _is_gain(paired, direction)}
                | {"value": cells[stage]["value"], "before": cells[other]["value"], "paired": paired}
            )
    return found


def _is_gain(paired: dict[str, Any] | None, direction: str) -> bool:
    """Whether a paired difference lies on the good side of zero with its whole interval."""
    return paired is not None and (paired["ci95"][0] > 0 if direction == UP else paired["ci95"][1] < 0)


def sentence(evaluation: Mapping[str, Any], goals_found: list[dict[str, Any]], size: str) -> str:
    """The verdict in one sentence: what the served model is and does, with the goals it missed named."""
    measured = [goal for goal in goals_found if goal["met"] is not None]
    if not measured:
        bits = cells_of(evaluation, "bits_per_byte").get("pretrain")
        if not bits:
            return f"{size} whose quality was not measured."
        return f"{size} that needs {bits['value']:.3f} bits per byte of held-out text; whether its answers are true was not measured."
    share = {goal["key"]: f"{100 * goal['cell']['value']:.0f}\u00a0%" for goal in measured}
    facts = [
        words.format(share[key])
        for key, words in (
            ("known_exact", "answers {} of known facts right"),
            ("invented_false", "asserts something false about {} of invented names"),
            ("over_refusal", "refuses {} of what it was taught"),
        )
        if key in share
    ]
    missed = [goal["label"] for goal in measured if not goal["met"]]
    outcome = f"{len(measured) - len(missed)} of {len(measured)} goals met" + (f" (missed: {', '.join(missed)})" if missed else "")
    return f"{size} that {_list(facts)}: {outcome}."


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sample_answers(files: BuildFiles, stages: list[str], limit: int = 24) -> list[dict[str, Any]]:
    """Questions of each group with every stage's answer, failures of the last stage and successes in turn.

    Returns [{group, heading, total, right: {stage: count}, samples: [{question, expected, source, answers: {stage: {answer,
    correct}}}]}]; `total` counts the distinct questions whose answers the evaluation kept. Which are shown is drawn by the hash of the
    question, so that they are of many kinds and nobody's choice.
    """
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in stages:
        for sample in rows(files.json(f"evals/{stage}.json", "", quiet=True).get("samples")):
            sample = table(sample)
            key = (str(sample.get("group", "")), str(sample.get("question", "")))
            entry = merged.setdefault(key, {"question": key[1], "answers": {}})
            entry.setdefault("expected", _expected(sample.get("expected", sample.get("answers"))))
            entry.setdefault("source", sample.get("source"))
            entry["answers"][stage] = {"answer": str(sample.get("answer", "")), "correct": bool(sample.get("correct"))}
    order = sorted(merged.items(), key=lambda item: hashlib.sha256(item[0][1].encode("utf-8", "replace")).digest())
    headings = {
        "known": "Known facts, phrasings not seen in training",
        "heldout": "Held-out facts, never trained on as questions",
        "invented": "Invented names: the right answer is that it does not know",
    }
    groups = [*headings, *dict.fromkeys(group for group, _ in merged if group not in headings)]
    found = []
    for group in groups:
        samples = [entry for (name, _), entry in order if name == group]
        if samples:
            right = {s: [e["answers"][s]["correct"] for e in samples if s in e["answers"]] for s in stages}
            found.append(
                {"group": group, "heading": headings.get(group, group), "total": len(samples)}
                | {"right": {s: [sum(marks), len(marks)] for s, marks in right.items() if marks}}
                | {"samples": _alternate(samples, stages)[:limit]}
            )
    return found


def _expected(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [] if value in (None, "") else [str(value)]


def _alternate(samples: list[dict[str, Any]], stages: list[str]) -> list[dict[str, Any]]:
    """Failure, success, failure ... by the last stage that answered, so that neither hides the other."""
    right, wrong = [], []
    for entry in samples:
        last = next(stage for stage in reversed(stages) if stage in entry["answers"])
        (right if entry["answers"][last]["correct"] else wrong).append(entry)
    shared = min(len(right), len(wrong))
    mixed = [entry for pair in zip(wrong, right) for entry in pair]
    return mixed + wrong[shared:] + right[shared:]
