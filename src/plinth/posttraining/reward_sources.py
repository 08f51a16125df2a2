"""Where the reward of sampled completions comes from: a rule that is known exactly, or a learnt reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from plinth.config import UserError, nearest
from plinth.inference.verifiers import VERIFIERS, check_name, verify
from plinth.models.reward import RewardModel
from plinth.posttraining.prompts import Prompt
from plinth.posttraining.reward import LoadedReward, load_reward
from plinth.run import find_model, tree_sha256
from plinth.tasks import reviews

Rule = Callable[[Prompt, str], float]


def by_verifier(name: str | None) -> Rule:
    """Return the rule of a verifier, or without a name of the one that each prompt's row names (exact where it names none)."""
    return lambda prompt, answer: verify(name or prompt.verifier or "exact", answer, prompt.answer or "")


RULES: dict[str, Rule] = {
    "reviews": lambda prompt, answer: reviews.reward(prompt.text, answer),
    "verifier": by_verifier(None),
    **{name: by_verifier(name) for name in VERIFIERS},
}
"""rewards that are known rules, by name"""
READ_ANSWERS = {"verifier", *VERIFIERS} - {"refusal"}


def check_answers(name: str, prompts: Sequence[Prompt]) -> None:
    """Raise UserError where a rule compares with answers and a prompt has none, or names a verifier that there is not."""
    for prompt in prompts if name in READ_ANSWERS else ():
        if prompt.answer is None:
            raise UserError(f"reward={name!r} compares with an answer, and the prompt {prompt.text[:60]!r} comes with none.")
        if name == "verifier" and prompt.verifier is not None:
            check_name(prompt.verifier)


class RewardSource(Protocol):
    """Gives answers their scores."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return the score of each answer to its prompt."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what tells this reward from others, for the resume."""
        ...


@dataclass(frozen=True)
class RuleReward:
    """A rule of RULES."""

    name: str
    """its name"""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return [RULES[self.name](prompt, answer) for prompt, answer in zip(prompts, answers)]

    def identity(self) -> dict[str, Any]:
        return {"reward": self.name}


@dataclass(frozen=True)
class LearntReward:
    """A reward model."""

    loaded: LoadedReward
    """the model with its tokenizer"""
    folder: Path
    """where it was loaded from"""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return self.loaded.score([prompt.messages for prompt in prompts], answers)

    def identity(self) -> dict[str, Any]:
        return {"reward": "learnt", "reward_sha256": tree_sha256(self.folder)}

    @property
    def model(self) -> RewardModel:
        return self.loaded.model


def open_rule(name: str) -> RuleReward:
    """Return a rule by its name. Raises UserError for one that there is not."""
    if name not in RULES:
        raise UserError(f"{name!r} is no rule of {', '.join(RULES)}.{nearest(name, RULES)}")
    return RuleReward(name)


def open_reward(spec: str, device: str = "cpu") -> RewardSource:
    """Return the rule of RULES that `spec` names, else the reward model in the run or folder that it names."""
    if spec in RULES:
        return open_rule(spec)
    if not Path(spec).exists():
        raise UserError(f"reward={spec!r} is neither a run of a reward model nor a known rule ({', '.join(RULES)}).{nearest(spec, RULES)}")
    return LearntReward(load_reward(Path(spec), device=device), find_model(Path(spec)))
