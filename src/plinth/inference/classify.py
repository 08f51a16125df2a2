"""Classes from a language model: each label scored as what follows a prompt, so that no answer lies outside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plinth.config import UserError
from plinth.inference.text import Prompt, TextEngine


@dataclass(frozen=True)
class Classification:
    """How likely each label is."""

    label: str
    """the most probable one; among equals the first"""
    probabilities: dict[str, float]
    """probability of each label, given that it is one of them"""
    scores: dict[str, float]
    """what the probabilities come from: log-probability in nats of the label's text, corrected as asked for"""


def classify(
    engine: TextEngine,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    *,
    per_token: bool = False,
    neutral: Prompt | None = None,
) -> list[Classification]:
    """Return the classification of each prompt: the probabilities of the labels as its continuation, which sum to 1.

    per_token: divide a label's log-probability by its tokens, against the advantage of short labels; no probability of the model
    then. neutral: a prompt without content; what it makes of the labels is subtracted, against labels that are common anywhere
    (Holtzman et al. 2021, arXiv:2104.08315). Where one label begins another, the end token behind each counts too.
    Raises UserError for fewer than two labels, equal ones, and what does not fit the context.
    """
    if len(set(labels)) < 2 or len(set(labels)) != len(labels) or not all(labels):
        raise UserError(f"labels={list(labels)} are not at least two texts, all different and none empty.")
    continuations = _continuations(engine, labels)
    asked = [engine.encode(prompt) for prompt in prompts]
    if neutral is not None:
        asked.append(engine.encode(neutral))
    rows = _scores(engine, asked, continuations)
    if per_token:
        rows = [[score / len(tokens) for score, tokens in zip(row, continuations)] for row in rows]
    if neutral is not None:
        prior = rows.pop()
        rows = [[score - before for score, before in zip(row, prior)] for row in rows]
    return [_classification(labels, row) for row in rows]


def _continuations(engine: TextEngine, labels: Sequence[str]) -> list[list[int]]:
    tokens = [engine.tokenizer.encode(label) for label in labels]
    overlap = any(a is not b and b[: len(a)] == a for a in tokens for b in tokens)
    if not overlap:
        return tokens
    if not engine.engine.eos_ids:
        raise UserError("one label begins another, and this engine has no end token to tell them apart. Rename one.")
    return [[*each, engine.engine.eos_ids[0]] for each in tokens]


def _scores(engine: TextEngine, prompts: list[list[int]], continuations: list[list[int]]) -> list[list[float]]:
    """Return the summed log-probability of each continuation behind each prompt; a prompt is read once."""
    logprobs = engine.engine.score([prompt + continuation for prompt in prompts for continuation in continuations])
    sums = iter(logprobs)
    return [[math.fsum(next(sums)[len(prompt) - 1 :]) for _ in continuations] for prompt in prompts]


def _classification(labels: Sequence[str], scores: list[float]) -> Classification:
    peak = max(scores)
    weights = [math.exp(score - peak) for score in scores]
    probabilities = {label: weight / math.fsum(weights) for label, weight in zip(labels, weights)}
    return Classification(labels[scores.index(peak)], probabilities, dict(zip(labels, scores)))
