"""`plinth evaluate`: held-out likelihood and questions with verifiable answers, each number with its interval."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError, save_json
from plinth.data.rejects import row_counts
from plinth.evaluation.problems import Problem, ProblemConfig, score_problems
from plinth.evaluation.run import EvaluationConfig, evaluate_build, evaluate_model
from plinth.inference.text import TextEngine
from plinth.posttraining.formats import read_examples
from plinth.run import MODEL_STAGES, file_sha256, find_model

COLUMNS = {"pretrain": "BASE", "sft": "SFT", "dpo": "DPO"}
ROWS = {
    "loss_nats": "held-out loss (nats a token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "bits_per_char": "bits per character",
    "known_exact": "known facts: right",
    "known_f1": "known facts: token F1",
    "consistency": "known facts: same answer to every phrasing",
    "over_refusal": "known facts: refused (lower is better)",
    "heldout_exact": "held-out facts: right",
    "heldout_f1": "held-out facts: token F1",
    "heldout_refusal": "held-out facts: refused",
    "invented_refusal": "invented names: refused",
    "invented_false": "invented names: false answer (lower is better)",
    "accuracy_answered": "answers given: right",
    "coverage": "questions answered at all",
    "refusal_precision": "refusals: of what was not taught",
    "refusal_recall": "not taught and not right: refused",
    "auroc": "confidence tells right from wrong (AUROC)",
    "ece": "confidence off the share right (ECE, lower is better)",
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Score held-out documents (loss, perplexity, bits per byte and character) and questions about known, held-out and invented names.

    A build directory is evaluated stage by stage, into its evals/. For a single run or model folder, shards and facts are looked for in
    the build around it. With --problems, only those are asked, and their verifiers judge.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Build directory, run directory, or model folder."""
    shards: Path | None = None
    """Folder of packed tokens, for the likelihood; default: shards/ of the build."""
    facts: Path | None = None
    """Folder with questions.jsonl and sft.jsonl; default: facts/ of the build."""
    problems: Path | None = None
    """Problems with an answer and a verifier, JSON Lines, as `plinth grpo` reads them."""
    problem: ProblemConfig = field(default_factory=ProblemConfig)
    """How problems are asked."""
    out: Path | None = None
    """JSON file to write for a single model; default: none. A build always writes evals/."""
    config: tyro.conf.OmitArgPrefixes[EvaluationConfig] = field(default_factory=EvaluationConfig)
    json: bool = False
    """Print the results as one JSON object."""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when there is no finished model or nothing to evaluate on."""
    options = read_options(EvaluateOptions, args=argv, prog="plinth evaluate")
    if options.problems is not None:
        result = evaluate_problems(options.model, options.problems, options.problem)
        if options.out is not None:
            save_json(options.out, result)
        emit(result, options.json, lambda console: render_problems(console, options.model.name, result["scores"]))
        return 0
    if is_build(options.model):
        if options.shards or options.facts or options.out:
            raise UserError(
                f"{options.model} is a build, which has its own shards, facts and evals/. Name one stage, as {options.model}/sft."
            )
        say(f"evaluating each stage of {options.model}")
        result = evaluate_build(options.model, options.config)
        columns = {COLUMNS[stage]: found for stage, found in result["stages"].items()}
    else:
        around = build_around(options.model)
        shards, facts = options.shards or _folder(around, "shards"), options.facts or _folder(around, "facts")
        say(f"evaluating {options.model}")
        result = evaluate_model(options.model, shards=shards, facts=facts, config=options.config, out=options.out)
        columns = {options.model.name: result}
    emit(result, options.json, lambda console: render(console, columns, result.get("differences", {})))
    return 0


def evaluate_problems(model: Path, problems: Path, config: ProblemConfig) -> dict[str, Any]:
    """Ask a model the problems of a file, which names the rows that it leaves out."""
    found = read_examples(problems, "verifiable")
    if found.rejected:
        say(f"{problems}: {found.describe()}")
    text = TextEngine.load(model)
    asked = [Problem(row.messages, row.answer, row.verifier) for row in found.rows]
    result = score_problems(text, asked, config)
    return {"model": str(find_model(model)), "problems_sha256": file_sha256(problems), **row_counts(len(found.rejected)), **result}


def render_problems(console: Console, name: str, scores: dict[str, Any]) -> None:
    """Draw the scores of problems, each as value, interval and n."""
    table = Table("score", name, title=Text("value [95 % interval] n"))
    for key, score in scores.items():
        table.add_row(key, Text(cell_text(score)))
    console.print(table)


def is_build(path: Path) -> bool:
    """Say whether a directory holds stages of its own and no model."""
    return not (path / "model").exists() and any((path / stage / "DONE").exists() for stage in MODEL_STAGES)


def build_around(path: Path) -> Path:
    """Return the directory that would be the build of a run or of a run's model folder."""
    path = path.resolve()
    return path.parent.parent if path.name == "model" else path.parent


def _folder(build: Path, name: str) -> Path | None:
    wanted = {"shards": "manifest.json", "facts": "questions.jsonl"}[name]
    return build / name if (build / name / wanted).exists() else None


def render(console: Console, columns: dict[str, dict[str, Any]], differences: dict[str, Any]) -> None:
    """Draw the table of scores, each as value, interval and n, and the paired differences below it."""
    table = Table("score", *columns, title=Text("value [95 % interval] n"))
    for key, label in ROWS.items():
        cells = [(found["likelihood"] | found["questions"]).get(key) for found in columns.values()]
        if any(cells):
            table.add_row(label, *(Text(cell_text(cell)) for cell in cells))
    console.print(table)
    for pair, scores in differences.items():
        for key, score in scores.items():
            console.print(f"{pair}: {key} {cell_text(score, signed=True)} paired", markup=False, highlight=False)


def cell_text(score: dict[str, Any] | None, signed: bool = False) -> str:
    """Return a score in one line, or a dash where it was not measured."""
    if not score or score["value"] is None:
        return "not measured"
    sign = "+" if signed else ""
    low, high = (f"{end:{sign}.3f}" if end is not None else "?" for end in score["ci95"])
    return f"{score['value']:{sign}.3f} [{low}, {high}] n={score['n']}"
