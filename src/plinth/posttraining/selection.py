"""Best of n and rejection sampling: several answers to each prompt, scored, and the best of them kept to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from plinth.config import UserError
from plinth.inference.chat_model import BATCH, ChatModel
from plinth.inference.sampling_params import SamplingParams
from plinth.posttraining.examples import Prompt
from plinth.posttraining.feedback import Comparison, judge_pairs
from plinth.posttraining.feedback_config import JudgeConfig, SelectionConfig
from plinth.posttraining.reward_sources import open_reward


@dataclass(frozen=True)
class Drawn:
    """A prompt's whole answers with their scores."""

    prompt: Prompt
    """what was asked"""
    answers: tuple[str, ...]
    """those that were not cut off, in the order that they were drawn"""
    scores: tuple[float, ...]
    """of each, empty where nothing scores"""

    def best(self) -> int:
        """Return the place of the highest score, the first among equals."""
        return max(range(len(self.answers)), key=lambda i: self.scores[i]) if self.scores else 0

    def worst(self) -> int:
        """Return the place of the lowest score, the first among equals."""
        return min(range(len(self.answers)), key=lambda i: self.scores[i])

    def kept(self, config: SelectionConfig) -> list[int]:
        """Return the places of the answers to learn from."""
        if not self.answers:
            return []
        if config.keep == "best":
            return [self.best()]
        different = {text: i for i, text in reversed(list(enumerate(self.answers)))}
        passing = [i for i in sorted(different.values()) if self.scores[i] >= config.threshold]
        return passing[: config.most_per_prompt]


Score = Callable[[Sequence[Prompt], Sequence[Sequence[str]]], list[list[float]]]
"""(prompts, answers of each) -> a score of each answer"""


def draw_answers(
    model: ChatModel, prompts: Sequence[Prompt], config: SelectionConfig, progress: Callable[[int], None] = lambda count: None
) -> tuple[list[list[str]], int]:
    """Return the whole answers to each prompt, and how many more were cut off."""
    found: list[list[str]] = []
    cut_off = 0
    per_call = max(1, BATCH // config.n)
    for start in range(0, len(prompts), per_call):
        part = prompts[start : start + per_call]
        first = (config.seed << 32) + start * config.n
        asked = [prompt.messages for prompt in part for _ in range(config.n)]
        params = [SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=first + i) for i in range(len(asked))]
        answers = model.answers(asked, params)
        for i in range(len(part)):
            group = answers[i * config.n : (i + 1) * config.n]
            found.append([answer.text for answer in group if answer.finished])
            cut_off += sum(not answer.finished for answer in group)
        progress(len(part))
    return found, cut_off


def open_score(
    config: SelectionConfig, prompts: Sequence[Prompt], judge: ChatModel | None, judge_config: JudgeConfig, principles: Sequence[str] = ()
) -> Score | None:
    """Return what scores answers to the prompts, None for by=first.

    Raises UserError where it is not known or cannot score answers to one of them, and where a judge is missing or not asked.
    """
    if (config.by == "judge") != (judge is not None):
        raise UserError(f"by={config.by}, and {'no judge' if judge is None else 'a judge'} is named. A judge goes with by=judge alone.")
    if judge is not None:
        return lambda prompts, answers: tournament(judge, prompts, answers, judge_config, principles)
    if config.by == "first":
        return None
    source = open_reward(config.by, verifier=config.verifier)
    source.check(prompts)

    def score(prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        each = [(prompt, text) for prompt, texts in zip(prompts, answers) for text in texts]
        values = iter(source.score([prompt for prompt, _ in each], [text for _, text in each]) if each else [])
        return [[float(next(values)) for _ in texts] for texts in answers]

    return score


def tournament(
    judge: ChatModel, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], config: JudgeConfig, principles: Sequence[str] = ()
) -> list[list[float]]:
    """Return of each answer the mean probability that it beats another one to its prompt, 0.5 where the judge decides nothing."""
    different = [list(dict.fromkeys(texts)) for texts in answers]
    meetings = [(p, a, b) for p, texts in enumerate(different) for a, b in combinations(range(len(texts)), 2)]
    pairs = [Comparison(prompts[p].messages, different[p][a], different[p][b]) for p, a, b in meetings]
    wins: list[dict[str, list[float]]] = [{text: [] for text in texts} for texts in different]
    for (p, a, b), judged in zip(meetings, judge_pairs(judge, pairs, config, principles)):
        value = 0.5 if judged is None else judged.probability
        wins[p][different[p][a]].append(value)
        wins[p][different[p][b]].append(1 - value)
    return [[sum(won := wins[p][text]) / len(won) if wins[p][text] else 0.5 for text in texts] for p, texts in enumerate(answers)]


def selection_row(drawn: Drawn, place: int, origin: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt with one of its answers, as `plinth sft` reads it, with its score and where it comes from."""
    score = {"score": drawn.scores[place]} if drawn.scores else {}
    messages = [*drawn.prompt.messages, {"role": "assistant", "content": drawn.answers[place]}]
    return {"messages": messages, **score, "selection": origin | {"answers": len(drawn.answers)}}
