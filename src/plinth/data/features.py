"""Labelled examples as rows of tokens: where a word's first token stands, which tokens an answer covers, windows over long texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from plinth.config import UserError
from plinth.data.buckets import UNCOUNTED, padded_width
from plinth.data.labelled import QuestionExample, TextExample, WordExample
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import EncoderTokens

NO_ANSWER = (0, 0)  # the span of a row that holds no answer: its first position


@dataclass(frozen=True)
class Row:
    """A row of tokens made from an example, and what is to be predicted of it."""

    example: int
    """the example's number"""
    tokens: list[int]
    segments: list[int]
    """0 for a text or a question, 1 for a second text or a context"""
    is_cut: bool = False
    """whether the example lost its end, being too long (classify)"""
    label: int = UNCOUNTED
    """of the text (classify)"""
    words: tuple[tuple[int, int], ...] = ()
    """(word, position of its first token) of the words in this row (tag)"""
    labels: tuple[int, ...] = ()
    """of these words (tag)"""
    spans: tuple[tuple[int, int] | None, ...] = ()
    """of each position, the characters of the context that it stands for; None outside the context (answer)"""
    span: tuple[int, int] = NO_ANSWER
    """first and last position of the answer (answer)"""


def text_rows(
    examples: Sequence[TextExample], tokenizer: Tokenizer, tokens: EncoderTokens, labels: Mapping[str, int], longest: int, truncate: bool
) -> list[Row]:
    """Return a row an example. One longer than `longest` tokens is cut at its end with `truncate`, else raises UserError."""
    firsts = tokenizer.encode_batch([example.text for example in examples])
    seconds = tokenizer.encode_batch([example.pair or "" for example in examples])
    rows = []
    for number, (example, first, second) in enumerate(zip(examples, firsts, seconds)):
        room = longest - (2 if example.pair is None else 3)
        excess = len(first) + (0 if example.pair is None else len(second)) - room
        if excess > 0 and not truncate:
            raise UserError(
                f"example {number + 1} has {excess + longest} tokens, more than {longest}. Shorten it, or pass --truncate to cut it."
            )
        is_cut = excess > 0
        while excess > 0:  # the longer of the two gives
            part = first if example.pair is None or len(first) >= len(second) else second
            part.pop()
            excess -= 1
        row = tokens.single(first) if example.pair is None else None
        ids, segments = (row, [0] * len(row)) if row is not None else tokens.pair(first, second)
        rows.append(Row(number, ids, segments, is_cut, label=_number(labels, example.label, number)))
    return rows


def causal_rows(
    examples: Sequence[TextExample], tokenizer: Tokenizer, labels: Mapping[str, int], longest: int | None, truncate: bool, backwards: bool
) -> list[Row]:
    """Return a row an example for a language model: what begins a document, then the text, and for a pair the same again.

    One longer than `longest` tokens (None: no limit) is cut at its end with `truncate`, else raises UserError. `backwards` turns the
    tokens behind the first round.
    """
    begin = [] if tokenizer.start_id is None else [tokenizer.start_id]
    firsts = tokenizer.encode_batch([example.text for example in examples])
    seconds = tokenizer.encode_batch([example.pair or "" for example in examples])
    rows = []
    for number, (example, first, second) in enumerate(zip(examples, firsts, seconds)):
        ids = first if example.pair is None else [*first, *begin, *second]
        is_cut = longest is not None and len(begin) + len(ids) > longest
        if is_cut and not truncate:
            raise UserError(
                f"example {number + 1} has {len(begin) + len(ids)} tokens, more than {longest}. Shorten it, or pass --truncate to cut it."
            )
        ids = ids if longest is None else ids[: longest - len(begin)]
        row = [*begin, *(reversed(ids) if backwards else ids)]
        if not row:
            raise UserError(f"example {number + 1} is empty, and the tokenizer has no token that begins a text. Leave it out.")
        rows.append(Row(number, row, [0] * len(row), is_cut, label=_number(labels, example.label, number)))
    return rows


def _number(labels: Mapping[str, int], label: str | None, number: int) -> int:
    if label is not None and label not in labels:
        raise UserError(f"example {number + 1} has the label {label!r}, which the model does not know. It knows {', '.join(labels)}.")
    return UNCOUNTED if label is None else labels[label]


def word_rows(
    examples: Sequence[WordExample], tokenizer: Tokenizer, tokens: EncoderTokens, labels: Mapping[str, int], longest: int
) -> list[Row]:
    """Return the rows of sentences: a word's tag is that of its first token. A long sentence is cut between words."""
    rows = []
    for number, example in enumerate(examples):
        pieces = _words_as_tokens(tokenizer, example.words)
        start = 0
        while start < len(pieces):
            stop, size = start, 0
            while stop < len(pieces) and size + len(pieces[stop]) <= longest - 2:
                size += len(pieces[stop])
                stop += 1
            if stop == start:
                raise UserError(f"example {number + 1}: the word {example.words[start][:40]!r} alone has more than {longest - 2} tokens.")
            rows.append(_word_row(number, example, pieces, start, stop, tokens, labels))
            start = stop
    return rows


def _words_as_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Return each word's tokens, encoded within its sentence, as running text is; a token belongs to the word where it begins."""
    text, ends = " ".join(words), []
    for word in words:
        ends.append((ends[-1] + 1 if ends else 0) + len(word))
    pieces: list[list[int]] = [[] for _ in words]
    word = 0
    for token_id, (first, last) in zip(*tokenizer.encode_with_offsets(text)):
        while first < last - 1 and text[first] == " ":
            first += 1
        while word < len(words) - 1 and first >= ends[word]:
            word += 1
        pieces[word].append(token_id)
    return pieces


def _word_row(number: int, example: WordExample, pieces, start: int, stop: int, tokens: EncoderTokens, labels: Mapping[str, int]) -> Row:
    ids: list[int] = []
    words = []
    for word in range(start, stop):
        if pieces[word]:  # a normaliser may leave nothing of one
            words.append((word, len(ids) + 1))
        ids += pieces[word]
    tags = () if example.tags is None else tuple(_number(labels, example.tags[word], number) for word, _ in words)
    row = tokens.single(ids)
    return Row(number, row, [0] * len(row), words=tuple(words), labels=tags)


def answer_rows(examples: Sequence[QuestionExample], tokenizer: Tokenizer, tokens: EncoderTokens, longest: int, stride: int) -> list[Row]:
    """Return the rows [CLS] question [SEP] context [SEP]; a long context comes in windows that share `stride` tokens.

    The first answer of an example is the one to learn; a window that does not hold all of it has no answer.
    Source: Devlin et al. 2018, arXiv:1810.04805, section 4.2, whose program has the windows.
    """
    rows = []
    for number, example in enumerate(examples):
        question, (ids, offsets) = tokenizer.encode(example.question), tokenizer.encode_with_offsets(example.context)
        room = longest - len(question) - 3
        if room < 8:
            raise UserError(f"example {number + 1}: a question of {len(question)} tokens leaves no room for a context in {longest}.")
        step, start = max(1, room - min(stride, room // 2)), 0
        while True:
            rows.append(_answer_row(number, example, question, ids[start : start + room], offsets[start : start + room], tokens))
            if start + room >= len(ids):
                break
            start += step
    return rows


def _answer_row(number: int, example: QuestionExample, question, ids, offsets, tokens: EncoderTokens) -> Row:
    row, segments = tokens.pair(question, ids)
    begin = len(question) + 2
    spans = (None,) * begin + tuple(offsets) + (None,)
    span = NO_ANSWER
    if example.answers and offsets:
        answer = example.answers[0]
        first, last = answer.start, answer.start + len(answer.text)
        covered = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
        whole = covered and offsets[covered[0]][0] <= first and offsets[covered[-1]][1] >= last
        span = (begin + covered[0], begin + covered[-1]) if whole else NO_ANSWER
    return Row(number, row, segments, spans=spans, span=span)


def pad_rows(rows: Sequence[Row], pad_id: int, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens, mask, segments), (B, T) each, of rows padded on the right; T is a multiple of 8 where `longest` allows."""
    width = min(padded_width(max(len(row.tokens) for row in rows)), max(longest, max(len(row.tokens) for row in rows)))
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    segments = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], mask[i, :n], segments[i, :n] = torch.tensor(row.tokens), True, torch.tensor(row.segments)
    return tokens, mask, segments


def targets(rows: Sequence[Row], task: str, width: int) -> torch.Tensor:
    """Return what the task's loss compares with: labels (B,), tags (B, T) with -1 where none is counted, or spans (B, 2)."""
    if task == "classify":
        return torch.tensor([row.label for row in rows])
    if task == "answer":
        return torch.tensor([row.span for row in rows])
    tags = torch.full((len(rows), width), UNCOUNTED)
    for i, row in enumerate(rows):
        for (_, position), label in zip(row.words, row.labels):
            tags[i, position] = label
    return tags
