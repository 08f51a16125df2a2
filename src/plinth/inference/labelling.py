"""What a finetuned encoder says of texts: a label, a tag for each word, the stretch that answers a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plinth.config import UserError
from plinth.data.features import Row, answer_rows, text_rows, word_rows
from plinth.data.labelled import OUTSIDE, QuestionExample, TextExample, WordExample
from plinth.inference.encoding import TextEncoder, run_rows

TASKS = ("classify", "tag", "answer")


@dataclass(frozen=True)
class Label:
    """A label for a text."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Tags:
    """A tag for each word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    probabilities: tuple[float, ...]
    """of these tags"""


@dataclass(frozen=True)
class Found:
    """The best answer in a context."""

    text: str
    """empty where the model says that there is none"""
    start: int
    """its first character; -1 where there is none"""
    score: float
    """of the best stretch minus that of no answer, in nats"""


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are chosen."""

    max_answer_tokens: int = 30
    """longest answer in tokens"""
    none_above: float | None = 0.0
    """say that there is no answer where its score is above the best stretch's by more than this, in nats; None: always answer"""
    stride: int = 64
    """tokens that neighbouring windows of a long context share"""


def check_task(encoder: TextEncoder, task: str | None = None) -> str:
    """Return the task that the model was finetuned for. Raises UserError when it is none, or another than `task`."""
    head = encoder.model.config.head
    if head not in TASKS:
        raise UserError(f"the model's head is {head}; predictions need a finetuned one. Make it with `plinth finetune --task ...`.")
    if task is not None and head != task:
        raise UserError(f"the model was finetuned to {head}, not to {task}.")
    return head


def classify_texts(encoder: TextEncoder, examples: Sequence[TextExample], truncate: bool = False) -> list[Label]:
    """Return the label of each text; a text longer than the model raises UserError unless `truncate`."""
    names = encoder.model.config.labels
    plain = [TextExample(example.text, example.pair) for example in examples]
    rows = text_rows(plain, encoder.tokenizer, encoder.tokens, {}, encoder.longest, truncate)

    def use(hidden: torch.Tensor, chosen: list[Row]) -> list[Label]:
        shares = encoder.model.scores(hidden).float().softmax(-1).tolist()
        return [Label(names[max(range(len(names)), key=row.__getitem__)], dict(zip(names, row))) for row in shares]

    return run_rows(encoder, rows, use)


def tag_words(encoder: TextEncoder, examples: Sequence[WordExample]) -> list[Tags]:
    """Return a tag for each word; one that the tokenizer makes nothing of is outside of all entities."""
    names = encoder.model.config.labels
    rows = word_rows([WordExample(example.words) for example in examples], encoder.tokenizer, encoder.tokens, {}, encoder.longest)

    def use(hidden: torch.Tensor, chosen: list[Row]) -> list[list[tuple[int, float, int]]]:
        best = encoder.model.scores(hidden).float().softmax(-1).max(-1)
        return [
            [(word, float(best.values[i, place]), int(best.indices[i, place])) for word, place in row.words] for i, row in enumerate(chosen)
        ]

    outside = OUTSIDE if OUTSIDE in names else names[0]
    tags = [[outside] * len(example.words) for example in examples]
    shares = [[1.0] * len(example.words) for example in examples]
    for row, found in zip(rows, run_rows(encoder, rows, use)):
        for word, share, label in found:
            tags[row.example][word], shares[row.example][word] = names[label], share
    return [Tags(example.words, tuple(tag), tuple(share)) for example, tag, share in zip(examples, tags, shares)]


def find_answers(encoder: TextEncoder, examples: Sequence[QuestionExample], options: AnswerOptions | None = None) -> list[Found]:
    """Return the best stretch of each context, over all its windows, or none.

    Source: Devlin et al. 2018, arXiv:1810.04805, section 4.2 and 4.3: a stretch scores the sum of its two ends; no answer, the first
    position's, and over several windows the least of these.
    """
    options = options or AnswerOptions()
    plain = [QuestionExample(example.question, example.context) for example in examples]
    rows = answer_rows(plain, encoder.tokenizer, encoder.tokens, encoder.longest, options.stride)

    def use(hidden: torch.Tensor, chosen: list[Row]) -> list[tuple[float, tuple[int, int], float]]:
        scores = encoder.model.scores(hidden).float()
        return [best_span(scores[i, : len(row.tokens)], row.spans, options.max_answer_tokens) for i, row in enumerate(chosen)]

    best: list[tuple[float, tuple[int, int]]] = [(-float("inf"), (0, 0))] * len(examples)
    none = [float("inf")] * len(examples)
    for row, (score, stretch, empty) in zip(rows, run_rows(encoder, rows, use)):
        best[row.example] = max(best[row.example], (score, stretch))
        none[row.example] = min(none[row.example], empty)
    return [_found(example, *best[i], none[i], options.none_above) for i, example in enumerate(examples)]


def best_span(scores_T2: torch.Tensor, spans: Sequence[tuple[int, int] | None], longest: int) -> tuple[float, tuple[int, int], float]:
    """Return the best stretch's score, its first and last character, and the score of no answer.

    A stretch begins and ends in the context, does not end before it begins, and has at most `longest` tokens.
    """
    inside = [i for i, span in enumerate(spans) if span is not None]
    empty = float(scores_T2[0].sum())
    if not inside:
        return -float("inf"), (0, 0), empty
    start_C, end_C = scores_T2[inside].unbind(-1)
    both_CC = start_C[:, None] + end_C[None, :]
    allowed = torch.ones_like(both_CC, dtype=torch.bool).triu().tril(longest - 1)
    score, place = both_CC.masked_fill(~allowed, -torch.inf).flatten().max(0)
    first, last = divmod(int(place), len(inside))
    begin, end = spans[inside[first]], spans[inside[last]]
    assert begin is not None and end is not None
    return float(score), (begin[0], end[1]), empty


def _found(example: QuestionExample, score: float, stretch: tuple[int, int], empty: float, none_above: float | None) -> Found:
    if none_above is not None and empty - score > none_above:
        return Found("", -1, score - empty)
    text = example.context[stretch[0] : stretch[1]]
    return Found(text.strip(), stretch[0] + len(text) - len(text.lstrip()), score - empty)
