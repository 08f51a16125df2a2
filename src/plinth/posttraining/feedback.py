"""AI feedback: a judge says which of two answers is better, asked in both orders, as a probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from plinth.config import UserError
from plinth.inference.chat_model import BATCH, ChatModel, Conversation
from plinth.inference.sampling_params import SamplingParams
from plinth.posttraining.examples import Preference, Ranking
from plinth.posttraining.feedback_config import JudgeConfig
from plinth.posttraining.formats import detect, read_records
from plinth.posttraining.principles import draw_principles
from plinth.tokenizer.chat import Message

OPTIONS = ("1", "2")


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt."""

    prompt: Conversation
    """messages before the answer"""
    first: str
    """an answer"""
    second: str
    """another"""
    human: bool | None = None
    """whether people prefer the first, where the file says so"""
    row: int = 0
    """its row in the file"""


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a comparison."""

    as_given: float
    """probability of the answer shown first, the first one shown first"""
    swapped: float
    """probability of the answer shown first, the second one shown first"""
    principle: str | None = None
    """what was asked about"""

    @property
    def probability(self) -> float:
        """The probability that the first answer is better, the mean of both orders.

        Source: Lee et al. 2023 (RLAIF), arXiv:2309.00267, section 2.1.
        """
        return (self.as_given + 1 - self.swapped) / 2


def read_comparisons(path: Path) -> tuple[list[Comparison], list[tuple[int, str]]]:
    """Return the pairs of answers in a file, and (row number, reason) of each row that gives none.

    Rows are pairs and rankings in any format that `plinth inspect` reads, whose order is kept as people's label, and rows of a prompt and
    several `completions` without ranks, which have no label; several completions give all their pairs.
    Raises UserError when there is no pair.
    """
    found, rejected = [], []
    for number, record in read_records(Path(path)):
        try:
            pairs = _comparisons(record, number)
            if not pairs:
                raise UserError("has not two different answers")
            found += pairs
        except UserError as error:
            rejected.append((number, str(error).rstrip(".")))
    if not found:
        why = f": row {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise UserError(f"{path} holds no two answers to one prompt{why}.")
    return found, rejected


def _comparisons(record: Any, number: int) -> list[Comparison]:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError("is no object with named fields")
    completions = record.get("completions")
    is_bare = isinstance(completions, list) and all(isinstance(text, str) for text in completions)
    if is_bare and not any(name in record for name in ("rank", "ranks", "scores")):
        record = record | {"ranks": [1] * len(completions)}
    row = detect(record).read(record)
    match row:
        case Preference():
            sides: list[tuple[list[Message], int]] = [(row.chosen, 0), (row.rejected, 1)]
        case Ranking():
            sides = list(zip(row.completions, row.ranks))
        case _:
            raise UserError("is neither a pair nor a prompt with several completions")
    texts = [(answer_of(messages), rank) for messages, rank in sides]
    return [
        Comparison(row.prompt, a, b, None if i == j else i < j, number) for (a, i), (b, j) in combinations(texts, 2) if a != b
    ]  # fmt: skip


def answer_of(messages: list[Message]) -> str:
    """Return an answer as one text."""
    return "\n\n".join(message.get("content") or "" for message in messages)


def question_text(prompt: Conversation, shown: tuple[str, str], config: JudgeConfig, principle: str | None, ending: str) -> str:
    """Return what a judge reads: the conversation, both answers, what to compare them by, and how to reply."""
    turns = "\n\n".join(f"{message['role'].capitalize()}: {message.get('content') or ''}" for message in prompt)
    asked = config.question if principle is None else f"{principle}\n{config.question}"
    return (
        f"{config.preamble}\n\n--- Conversation ---\n{turns}\n\n--- Answer 1 ---\n{shown[0]}\n\n--- Answer 2 ---\n{shown[1]}\n\n"
        f"--- Question ---\n{asked}\n{ending}"
    )


CHOOSE = "Reply with 1 or 2 alone."
REASON = "Think about both answers first, in a few sentences. Do not choose yet."


def judge_pairs(
    judge: ChatModel,
    comparisons: Sequence[Comparison],
    config: JudgeConfig,
    principles: Sequence[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> list[Judgement | None]:
    """Ask the judge about each pair in both orders; None where it gave neither option in one of them.

    A principle is drawn for each pair, the same in both orders. `progress` is told how many more pairs are done.
    """
    drawn: Sequence[str | None] = draw_principles(list(principles), len(comparisons), config.seed) or [None] * len(comparisons)
    found: list[Judgement | None] = []
    for start in range(0, len(comparisons), BATCH // 2):
        part = list(zip(comparisons, drawn))[start : start + BATCH // 2]
        shown = [(pair, order, principle) for pair, principle in part for order in ((pair.first, pair.second), (pair.second, pair.first))]
        places = [2 * start + i for i in range(len(shown))]
        values = [
            _probability(logprobs, config.clamp) for logprobs in judge.option_logprobs(_questions(judge, shown, places, config), OPTIONS)
        ]
        for i, (_, principle) in enumerate(part):
            a, b = values[2 * i : 2 * i + 2]
            found.append(None if a is None or b is None else Judgement(a, b, principle))
        progress(len(part))
    return found


def _questions(judge: ChatModel, shown: Sequence[tuple[Comparison, tuple[str, str], str | None]], places, config: JudgeConfig):
    """Return the conversations that end where the judge is to choose; with reasoning, after it has reasoned."""
    if not config.reasoning_tokens:
        return [[_user(question_text(pair.prompt, order, config, principle, CHOOSE))] for pair, order, principle in shown]
    asked = [[_user(question_text(pair.prompt, order, config, principle, REASON))] for pair, order, principle in shown]
    params = [
        SamplingParams(temperature=config.temperature, max_tokens=config.reasoning_tokens, seed=config.seed + place) for place in places
    ]
    thoughts = judge.answers(asked, params)
    return [[*question, {"role": "assistant", "content": thought.text}, _user(CHOOSE)] for question, thought in zip(asked, thoughts)]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _probability(logprobs: list[float] | None, clamp: float | None) -> float | None:
    """Return the share of the first option among both, kept within 1 − clamp and clamp.

    Source of the bound: Bai et al. 2022, arXiv:2212.08073, section 4.1, which takes 0.4 to 0.6.
    """
    if logprobs is None:
        return None
    share = float(1 / (1 + np.exp(np.clip(logprobs[1] - logprobs[0], -500, 500))))
    return share if clamp is None else min(max(share, 1 - clamp), clamp)


def preference_row(comparison: Comparison, judgement: Judgement, judge: dict[str, Any]) -> dict[str, Any]:
    """Return a pair with its soft label and where it comes from, as `plinth prefer` and `plinth reward` read it."""
    first_better = judgement.probability > 0.5
    chosen, rejected = (comparison.first, comparison.second)[:: 1 if first_better else -1]
    origin = {
        "judge": judge,
        "row": comparison.row,
        "orders": [judgement.as_given, judgement.swapped],
        "chosen_place": 1 if first_better else 2,
        **({} if judgement.principle is None else {"principle": judgement.principle}),
        **({} if comparison.human is None else {"human_agrees": comparison.human == first_better}),
    }
    probability = max(judgement.probability, 1 - judgement.probability)
    return {"prompt": comparison.prompt, "chosen": chosen, "rejected": rejected, "probability": probability, "feedback": origin}
