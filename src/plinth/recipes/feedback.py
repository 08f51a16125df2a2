"""AI feedback from a file of answers to a file of preference pairs, with a report on the judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plinth.config import UserError, read_json, save_json, to_dict, write_atomic
from plinth.data.rejects import row_counts
from plinth.evaluation.judging import judge_report
from plinth.inference.chat_model import ChatModel, KeptAnswers
from plinth.inference.endpoint import Endpoint, EndpointConfig
from plinth.posttraining.feedback import judge_pairs, preference_row, read_comparisons
from plinth.posttraining.feedback_config import FeedbackConfig
from plinth.posttraining.principles import read_principles
from plinth.run import Progress, file_sha256

KEPT_FILE = "asked.jsonl"
TIE = 1e-6  # a judge that goes by the position alone gives 0.5 but for rounding


def open_model(run: Path | None, endpoint: EndpointConfig) -> ChatModel:
    """Return the model of a run, or the one behind a server. Raises UserError unless one of them is named."""
    if (run is None) == (endpoint.url is None):
        raise UserError("name one model to ask: a run or model folder, or a server with --endpoint.url and --endpoint.model.")
    if run is None:
        return Endpoint(endpoint)
    from plinth.inference.local_model import LocalModel

    return LocalModel.load(run)


def refuse_other(out: Path, name: str, data: Path) -> None:
    """Raise UserError where `out` holds what was made of another file: report.json names it under `name`."""
    made_of = read_json(out / "report.json").get(name, {}) if (out / "report.json").exists() else {}
    if made_of and data.is_file() and made_of["sha256"] != file_sha256(data):
        raise UserError(f"{out} holds what was made of {made_of['path']}, and {data} has other rows. Name a new folder with --out.")


def make_feedback(
    answers: Path, model: ChatModel, out: Path, config: FeedbackConfig, warn: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Judge the pairs of answers in a file; write out/pairs.jsonl and out/report.json, and return the report.

    What the judge said is kept in out/asked.jsonl as it comes: called again after an interruption, this goes on from there.
    Rows that hold no two answers, pairs that the judge did not decide or was not sure enough of are counted.
    Raises UserError where `out` holds what was made of another file.
    """
    refuse_other(out, "answers", answers)
    comparisons, rejected = read_comparisons(answers)
    if rejected:
        shown = "; ".join(f"row {number}: {reason}" for number, reason in rejected[:3])
        warn(f"{answers}: {len(rejected)} rows rejected ({shown})")
    principles = [] if config.principles is None else read_principles(config.principles)
    kept = KeptAnswers(model, out / KEPT_FILE)
    with Progress(len(comparisons), "judging", "pair") as progress:
        found = judge_pairs(kept, comparisons, config.judge, principles, progress.update)
    decided = [(pair, judged) for pair, judged in zip(comparisons, found) if judged is not None]
    if not decided:
        raise UserError(f"the judge chose neither 1 nor 2 in any of {len(comparisons)} pairs. Take another judge, or another question.")
    sure = [(pair, judged) for pair, judged in decided if abs(judged.probability - 0.5) >= max(config.min_probability - 0.5, TIE)]
    write_lines(out / "pairs.jsonl", (preference_row(pair, judged, model.identity) for pair, judged in sure))
    report = {
        "judge": model.identity,
        "answers": {"path": str(answers), "sha256": file_sha256(answers)},
        "config": to_dict(config),
        **row_counts(len(rejected)),
        "undecided": len(comparisons) - len(decided),
        "unsure": len(decided) - len(sure),
        "written": len(sure),
        "asked": kept.asked,
        "known": kept.known,
        **judge_report([(j.as_given, j.swapped) for _, j in decided], [p.human for p, _ in decided], [p.row for p, _ in decided]),
    }
    save_json(out / "report.json", report)
    return report


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON Lines, all or nothing, and return their number."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines))
    return len(lines)
