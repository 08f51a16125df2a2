"""Problems whose answers a verifier judges: the share right in one draw, in any of k, and without chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError
from plinth.evaluation.sample_curve import pass_at
from plinth.evaluation.statistics import Score, mean_score
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.text import TextCompletion, TextEngine
from plinth.inference.verifiers import check_answer, check_name, verify
from plinth.run import Progress
from plinth.tokenizer.chat import Message

CHUNK = 256  # completions between two updates of the progress


@dataclass(frozen=True)
class ProblemConfig:
    """How problems are asked."""

    samples: int = 8
    """answers drawn to each problem, for pass@1 and pass@k with k up to it; 0 = the greedy one alone"""
    temperature: float = 1.0
    """of those that are drawn"""
    max_tokens: int = 128
    """longest answer"""
    max_problems: int | None = 200
    """problems asked, the first of the file; None = all"""
    verifier: str = "exact"
    """verifier of rows that name none"""
    seed: int = 0
    """of the draws"""

    def __post_init__(self) -> None:
        check_name(self.verifier)
        for name, least in (("samples", 0), ("max_tokens", 1), ("max_problems", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}.")


@dataclass(frozen=True)
class Problem:
    """What is asked, and how an answer is judged."""

    prompt: list[Message]
    """messages before the answer"""
    answer: str
    """what the verifier compares with"""
    verifier: str | None = None
    """its name, where the data say so"""


def score_problems(text: TextEngine, problems: Sequence[Problem], config: ProblemConfig | None = None) -> dict[str, Any]:
    """Ask problems and return {scores, samples, protocol}: greedy and, with samples, pass@1, pass@2, pass@4, ... up to their number.

    Scores have 95 % intervals over problems. pass@k is the estimator without bias of all draws. An answer is right when its verifier
    gives 1. Raises UserError where a verifier or an answer to compare with is none.
    """
    config = config or ProblemConfig()
    asked = list(problems[: config.max_problems])
    names = [problem.verifier or config.verifier for problem in asked]
    for name, problem in zip(names, asked):
        check_answer(name, problem.answer)
    drawn = _answers(text, asked, config)
    values = [[verify(name, one.text, problem.answer) for one in each] for name, problem, each in zip(names, asked, drawn)]
    protocol = {
        "problems": len(asked), "samples": config.samples, "temperature": config.temperature, "max_tokens": config.max_tokens,
        "seed": config.seed, "verifiers": sorted(set(names)), "interval": "over problems",
    }  # fmt: skip
    scores = {"greedy": mean_score([float(each[0] == 1.0) for each in values], protocol=protocol)}
    for k in _powers(config.samples):
        right = [[value == 1.0 for value in each[1:]] for each in values]
        scores[f"pass@{k}"] = _mean([pass_at(each, k) for each in right], protocol)
    samples = [
        {"prompt": problem.prompt[-1]["content"], "answer": problem.answer, "verifier": name, "greedy": each[0].text, "score": found[0],
         "right_of_samples": sum(value == 1.0 for value in found[1:])}
        for problem, name, each, found in zip(asked, names, drawn, values)
    ]  # fmt: skip
    return {"scores": {name: score.to_dict() for name, score in scores.items()}, "samples": samples, "protocol": protocol}


def _mean(values: list[float], protocol: dict[str, Any]) -> Score:
    return mean_score([min(1.0, value) for value in values], protocol=protocol)


def _powers(samples: int) -> list[int]:
    return [2**power for power in range(samples.bit_length()) if 2**power <= samples]


def _answers(text: TextEngine, problems: Sequence[Problem], config: ProblemConfig) -> list[list[TextCompletion]]:
    """Return each problem's greedy answer and then its draws."""
    drawn = [
        SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=config.seed + i) for i in range(config.samples)
    ]
    each = [SamplingParams(temperature=0.0, max_tokens=config.max_tokens), *drawn]
    found: list[list[TextCompletion]] = []
    step = max(1, CHUNK // len(each))
    with Progress(len(problems), "problems", "problems") as progress:
        for start in range(0, len(problems), step):
            part = problems[start : start + step]
            completions = text.chat([problem.prompt for problem in part for _ in each], [params for _ in part for params in each])
            found += [completions[i : i + len(each)] for i in range(0, len(completions), len(each))]
            progress.update(len(part))
    return found
