"""`plinth predict`: labels, tags or answers from a finetuned encoder or classifier, and how right they are where the data says so."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError, write_atomic
from plinth.data.labelled import OUTSIDE, from_texts, read_examples
from plinth.data.rejects import row_counts
from plinth.evaluation.predictions import averaged, open_predictor, predict, score_predictions
from plinth.inference.labelling import AnswerOptions

SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Predict labels, tags or answers with a finetuned encoder or classifier; where the data has the right ones, score them.

    The data are as `plinth finetune` and `plinth transfer classify` take them; the labels may be left out.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """run or model folder of a finetuned encoder or classifier"""
    data: Annotated[Path | None, tyro.conf.Positional] = None
    """examples, with the right labels or without"""
    text: tuple[str, ...] = ()
    """texts instead of a file: to label, to tag, or as contexts of --question"""
    ensemble: tuple[Path, ...] = ()
    """classify: further runs whose probabilities are averaged with the first's, for instance one that reads backwards"""
    question: str | None = None
    """answer: what is asked of each --text"""
    out: Path | None = None
    """write the predictions to this file, one JSON object a line (default: print the first ones)"""
    truncate: bool = False
    """classify: cut texts that are longer than the model at their end (default: they are an error)"""
    answers: Annotated[AnswerOptions, tyro.conf.arg(name="")] = field(default_factory=AnswerOptions)
    """how answers are chosen"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth predict", args=argv)
    encoder, task = open_predictor(options.run)
    examples, counts = examples_of(options, task)
    labels = predict(encoder, task, examples, truncate=options.truncate, answers=options.answers)
    found = [asdict(one) for one in (with_ensemble(options, task, examples, labels) if options.ensemble else labels)]
    scores = {name: score.to_dict() for name, score in score_predictions(task, examples, found).items()}
    if options.out is not None:
        write_atomic(options.out, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found))
    result: dict[str, Any] = {"task": task, "examples": len(examples), **counts, "scores": scores}
    result |= {"predictions": found} if options.out is None else {"out": str(options.out)}

    def render(console) -> None:
        for one in found[:SHOWN] if options.out is None else []:
            console.print(shown(task, one), markup=False)
        for name, score in scores.items():
            console.print(f"{name} {score['value']:.3f} [{score['ci95'][0]:.3f}, {score['ci95'][1]:.3f}], n={score['n']}", markup=False)

    emit(result, options.json, render)
    return 0


def with_ensemble(options: Options, task: Any, examples: list[Any], labels: list[Any]) -> list[Any]:
    """Return labels by the mean of all runs' probabilities. Raises UserError for another task, and runs of other labels."""
    others = [open_predictor(run) for run in options.ensemble]
    if {task, *(other for _, other in others)} != {"classify"}:
        raise UserError("--ensemble averages labels of texts, so each of the runs must have been finetuned to classify.")
    found = [predict(encoder, task, examples, truncate=options.truncate) for encoder, _ in others]
    return averaged([labels, *found], [str(run) for run in (options.run, *options.ensemble)])


def examples_of(options: Options, task: Any) -> tuple[list[Any], dict[str, int]]:
    """Return the examples of the file, or of the texts, and how many rows were not read.

    Raises UserError when neither is named, or both.
    """
    if (options.data is None) == (not options.text):
        raise UserError("name either a file of examples or --text.")
    if options.data is None:
        return from_texts(options.text, task, options.question), {}
    examples, rejects = read_examples(options.data, task, labelled=False)
    if rejects.count:
        say(f"{options.data}: {rejects.describe()}")
    return examples, row_counts(rejects.count)


def shown(task: str, one: dict[str, Any]) -> str:
    """Return a prediction on one line."""
    if task == "tag":
        return " ".join(word if tag == OUTSIDE else f"{word}/{tag}" for word, tag in zip(one["words"], one["tags"]))
    return f"{one['label']} {max(one['probabilities'].values()):.3f}" if task == "classify" else one["text"] or "(no answer)"
