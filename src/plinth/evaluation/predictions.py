"""Predictions of a finetuned encoder or text classifier on examples, and their scores where the examples have the right labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plinth.config import UserError
from plinth.evaluation.labelled import score_answers, score_labels, score_tags
from plinth.evaluation.statistics import Score
from plinth.inference.encoding import TextEncoder
from plinth.inference.labelling import AnswerOptions, Label, check_task, classify_texts, find_answers, tag_words
from plinth.inference.text_classifier import LoadedClassifier
from plinth.models.hub import read_config
from plinth.models.text_classifier import TextClassifierConfig
from plinth.run import find_model


def open_predictor(path: Path) -> tuple[TextEncoder | LoadedClassifier, str]:
    """Open a run or model folder that predicts, and say for which task. Raises UserError for another model."""
    if isinstance(read_config(find_model(path))[1], TextClassifierConfig):
        return LoadedClassifier.load(path), "classify"
    encoder = TextEncoder.load(path)
    return encoder, check_task(encoder)


def predict(
    encoder: TextEncoder | LoadedClassifier,
    task: str,
    examples: Sequence[Any],
    *,
    truncate: bool = False,
    answers: AnswerOptions | None = None,
) -> list[Any]:
    """Return a Label, Tags or Found for each example."""
    if isinstance(encoder, LoadedClassifier):
        return list(encoder.classify(examples, truncate))
    if task == "classify":
        return list(classify_texts(encoder, examples, truncate))
    return list(tag_words(encoder, examples)) if task == "tag" else list(find_answers(encoder, examples, answers))


def averaged(found: Sequence[Sequence[Label]], names: Sequence[str]) -> list[Label]:
    """Return labels by the mean of several classifiers' probabilities; `found` has those of each, `names` what to call them in errors.

    Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.3 (a forward and a backward model).
    Raises UserError where they do not tell the same labels.
    """
    labels = [sorted(each[0].probabilities) for each in found if each]
    for other, name in zip(labels, names):
        if other != labels[0]:
            raise UserError(f"{name} tells {', '.join(other)}; {names[0]} tells {', '.join(labels[0])}. Average models of the same labels.")
    means = [{label: sum(one.probabilities[label] for one in row) / len(row) for label in row[0].probabilities} for row in zip(*found)]
    return [Label(max(mean, key=mean.__getitem__), mean) for mean in means]


def score_predictions(task: str, examples: Sequence[Any], found: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """Return the scores over the examples that have a right label; none when no example has."""
    name = {"classify": "label", "tag": "tags", "answer": "answers"}[task]
    known = [i for i, example in enumerate(examples) if getattr(example, name) is not None]
    if not known:
        return {}
    if task == "classify":
        return score_labels([found[i]["label"] for i in known], [examples[i].label for i in known])
    if task == "tag":
        return score_tags([found[i]["tags"] for i in known], [examples[i].tags for i in known])
    return score_answers([found[i]["text"] for i in known], [[answer.text for answer in examples[i].answers] for i in known])
