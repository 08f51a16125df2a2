"""Labelled examples for encoders: texts with a label, words with tags, questions on a text; from JSON Lines, columns or SQuAD's JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plinth.config import UserError, nearest
from plinth.data.parallel import read_lines
from plinth.data.rejects import Rejects

Task = Literal["classify", "tag", "answer"]
OUTSIDE = "O"  # the tag of words that belong to no entity
FORMS = {
    "classify": '{"text": ..., "label": ...}, and "pair" for a second text',
    "tag": '{"words": [...], "tags": [...]}, or a word and its tag a line with a blank line between sentences',
    "answer": '{"question": ..., "context": ..., "answers": [{"text": ..., "start": ...}]}, or SQuAD\'s JSON',
}


@dataclass(frozen=True)
class TextExample:
    """A text, or a pair of texts, and its label."""

    text: str
    pair: str | None = None
    """the second text, for instance a hypothesis to a premise"""
    label: str | None = None
    """None where it is to be predicted"""


@dataclass(frozen=True)
class WordExample:
    """The words of a sentence and their tags, B-NAME for the first word of an entity, I-NAME for its others, O outside."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    """as many as words; None where they are to be predicted"""


@dataclass(frozen=True)
class Answer:
    """A stretch of a context."""

    text: str
    start: int
    """its first character in the context"""


@dataclass(frozen=True)
class QuestionExample:
    """A question on a context, and the stretches that answer it."""

    question: str
    context: str
    answers: tuple[Answer, ...] | None = None
    """empty when the context holds no answer; None where it is to be found"""
    id: str = ""


Example = TextExample | WordExample | QuestionExample


def read_examples(path: Path, task: Task, labelled: bool) -> tuple[list[Any], Rejects]:
    """Read examples of a task; lines that are malformed, or lack the label that `labelled` asks for, are counted with their numbers.

    Raises UserError when the file is absent or holds no valid example.
    """
    examples, rejects = [], Rejects()
    for number, record in _records(path, task, rejects):
        try:
            examples.append(_parse(record, task, labelled))
        except UserError as error:
            rejects.add(number, str(error).rstrip("."))
    if not examples:
        raise UserError(f"{path} holds no valid example: {rejects.describe() or 'it is empty'}. Task {task} takes {FORMS[task]}.")
    return examples, rejects


def _records(path: Path, task: Task, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    lines = read_lines(path)
    first = next((line.lstrip() for line in lines if line.strip()), "")
    if task == "tag" and not first.startswith("{"):
        yield from _sentences(lines)
        return
    if task == "answer" and (squad := _squad("\n".join(lines))) is not None:
        yield from enumerate(squad, start=1)
        return
    if path.name.removesuffix(".gz").endswith((".csv", ".tsv")):
        raise UserError(f"{path} is a table of text. Write its rows as JSON Lines, an object of named fields each.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            rejects.add(number, f"not JSON: {error.msg} at column {error.colno}")


def _sentences(lines: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield sentences of a file of columns, the word first and the tag last; lines of -DOCSTART- are no words."""
    words: list[list[str]] = []
    begin = 1
    for number, line in enumerate([*lines, ""], start=1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            begin = begin if words else number
            words.append(columns)
        elif words:
            tags = [row[-1] for row in words] if all(len(row) > 1 for row in words) else None
            yield begin, {"words": [row[0] for row in words]} | ({} if tags is None else {"tags": tags})
            words = []


def _squad(text: str) -> list[dict[str, Any]] | None:
    """Return the questions of a file in SQuAD's own JSON, None for another file."""
    try:
        root = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(root, dict) or not isinstance(root.get("data"), list):
        return None
    try:
        return [
            {
                "question": question["question"],
                "context": paragraph["context"],
                "id": str(question.get("id", "")),
                "answers": [
                    {"text": answer["text"], "start": answer["answer_start"]}
                    for answer in ([] if question.get("is_impossible") else question.get("answers", []))
                ],
            }
            for article in root["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"the file looks like SQuAD's JSON, but lacks {error}.") from None


def _parse(record: Any, task: Task, labelled: bool) -> Example:
    if not isinstance(record, dict):
        raise UserError("not an object")
    if task == "classify":
        label = record.get("label")
        if labelled and label is None:
            raise UserError(_lacks(record, "label", ""))
        return TextExample(_text(record, "text"), record.get("pair"), None if label is None else str(label))
    if task == "tag":
        return _parse_words(record, labelled)
    return _parse_question(record, labelled)


def _parse_words(record: dict[str, Any], labelled: bool) -> WordExample:
    words, tags = record.get("words"), record.get("tags")
    if words is None and isinstance(record.get("text"), str):
        words = split_words(record["text"])
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise UserError(f"no 'words', a list of words.{nearest('words', record)}")
    if tags is None:
        if labelled:
            raise UserError(f"no 'tags'.{nearest('tags', record)}")
        return WordExample(tuple(words))
    if not isinstance(tags, list) or len(tags) != len(words):
        raise UserError(f"{len(words)} words with {len(tags) if isinstance(tags, list) else 'no list of'} tags")
    return WordExample(tuple(words), tuple(str(tag) for tag in tags))


def split_words(text: str) -> list[str]:
    """Return the words of a text, signs apart, as labelled sentences have them."""
    return re.findall(r"\w+|[^\w\s]", text)


def from_texts(texts: Sequence[str], task: Task, question: str | None = None) -> list[Example]:
    """Return plain texts as examples without labels; for task answer they are the contexts of `question`."""
    if task == "answer" and question is None:
        raise UserError("a model that finds answers needs a question. Pass --question.")
    if task == "answer":
        return [QuestionExample(question or "", text) for text in texts]
    return [TextExample(text) if task == "classify" else WordExample(tuple(split_words(text))) for text in texts]


def _parse_question(record: dict[str, Any], labelled: bool) -> QuestionExample:
    question, context = _text(record, "question"), _text(record, "context")
    found = record.get("answers")
    if isinstance(found, dict):  # columns, as the datasets library has SQuAD
        found = [{"text": text, "start": start} for text, start in zip(found.get("text", []), found.get("answer_start", []))]
    if found is None:
        if labelled:
            raise UserError(f"no 'answers' (an empty list where there is none).{nearest('answers', record)}")
        return QuestionExample(question, context, None, str(record.get("id", "")))
    answers = []
    for answer in found if isinstance(found, list) else [found]:
        text, start = answer.get("text"), answer.get("start", answer.get("answer_start"))
        if not isinstance(text, str) or not text:
            raise UserError("an answer without 'text'")
        start = context.find(text) if start is None else start
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            raise UserError(f"the answer {text[:40]!r} does not stand at character {start} of the context")
        answers.append(Answer(text, start))
    return QuestionExample(question, context, tuple(answers), str(record.get("id", "")))


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str) or not record[name].strip():
        raise UserError(_lacks(record, name))
    return record[name]


def _lacks(record: dict[str, Any], name: str, form: str = ", a text") -> str:
    """Return what is wrong with a field that holds no text: it is not there, empty, or of another type."""
    if name not in record:
        return f"no {name!r}{form}.{nearest(name, record)}"
    value = record[name]
    return f"{name!r} is {'empty' if value is None or value == '' or str(value).isspace() else f'of type {type(value).__name__}, no text'}"


def label_names(examples: Sequence[Example], task: Task) -> tuple[str, ...]:
    """Return the labels that examples have, in alphabetical order, the tag outside of all entities first; none for task answer."""
    if task == "classify":
        return tuple(sorted({example.label for example in examples if example.label is not None}))
    if task == "tag":
        tags = {tag for example in examples for tag in example.tags or ()}
        return tuple(sorted(tags, key=lambda tag: (tag != OUTSIDE, tag)))
    return ()
