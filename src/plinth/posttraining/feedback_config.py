"""How judges and critics are asked, and which answers are kept: what feedback, revision and selection are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plinth.config import UserError
from plinth.posttraining.rollout_config import DEFAULT_VERIFIER

QUESTION = "Which answer is better?"


@dataclass(frozen=True)
class JudgeConfig:
    """How a judge is asked."""

    question: str = QUESTION
    """asked of every pair; with principles, one of them stands before it"""
    preamble: str = "You compare two answers to the same conversation."
    """what every question begins with"""
    reasoning_tokens: int = 0
    """tokens that the judge may reason in before it chooses; 0 asks for the choice alone"""
    clamp: float | None = None
    """largest probability that one order may give, such as 0.6: with reasoning, judges are too sure (default: no bound)"""
    temperature: float = 0.7
    """of the reasoning"""
    seed: int = 0
    """of the reasoning, and of which principle is asked about"""

    def __post_init__(self) -> None:
        if self.reasoning_tokens < 0:
            raise UserError(f"reasoning_tokens={self.reasoning_tokens} must be 0 or more.")
        if self.clamp is not None and not 0.5 < self.clamp <= 1:
            raise UserError(f"clamp={self.clamp} must be above 0.5 and at most 1: a probability is kept within 1 − clamp and clamp.")


@dataclass(frozen=True)
class FeedbackConfig:
    """How pairs are judged, and which are written."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """how the judge is asked"""
    principles: Path | None = None
    """constitution: a text file with one principle a line, of which one is drawn for each pair (default: the question alone)"""
    min_probability: float = 0.5
    """least probability of the better answer for a pair to be written"""

    def __post_init__(self) -> None:
        if not 0.5 <= self.min_probability < 1:
            raise UserError(f"min_probability={self.min_probability} must be at least 0.5 and below 1.")


@dataclass(frozen=True)
class RevisionConfig:
    """How answers are written, criticised and written anew."""

    rounds: int = 1
    """times that an answer is criticised and written anew, each by a principle that is drawn"""
    critique: str = "Say where your last answer does not live up to this principle: {principle}"
    """what asks for a critique; {principle} stands for the principle"""
    revise: str = "Now write your answer to me anew so that it does, without mentioning the principle. Reply with the new answer alone."
    """what asks for the new answer"""
    max_tokens: int = 256
    """longest answer or critique in tokens"""
    temperature: float = 0.7
    """divisor of the logits"""
    seed: int = 0
    """of all that is drawn"""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds} must be at least 1.")
        if "{principle}" not in self.critique:
            raise UserError(f"critique={self.critique!r} has no {{principle}}, so the critic would not know by what.")


@dataclass(frozen=True)
class SelectionConfig:
    """How many answers are drawn, what scores them, and which are kept."""

    n: int = 8
    """answers drawn to each prompt"""
    by: str = "first"
    """what scores them: a run of a reward model, a known rule (verifier: the one that each prompt's row names), judge, or first for none"""
    verifier: str = DEFAULT_VERIFIER
    """verifier of rows that name none: exact, words, numeric, regex, json, code, sql or refusal"""
    keep: Literal["best", "passing"] = "best"
    """best: the answer of the highest score; passing: all different answers that reach the threshold (rejection sampling)"""
    threshold: float = 1.0
    """least score of a passing answer"""
    most_per_prompt: int = 4
    """passing answers kept of one prompt at most, in the order that they were drawn"""
    max_tokens: int = 128
    """longest answer in tokens; one that is cut off is never kept"""
    temperature: float = 1.0
    """divisor of the logits"""
    seed: int = 0
    """of the draws"""

    def __post_init__(self) -> None:
        for name in ("n", "most_per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.by == "first" and self.keep == "passing":
            raise UserError("keep=passing needs scores, and by=first gives none. Name a reward model, a rule, verifier or judge with --by.")
