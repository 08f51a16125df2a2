"""Where the reward of sampled completions comes from: a rule that is known exactly, or a learnt reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from plinth.config import UserError, nearest
from plinth.inference.verifiers import VERIFIERS, check_answer, check_name, verify
from plinth.posttraining.examples import Prompt
from plinth.posttraining.rollout_config import DEFAULT_VERIFIER
from plinth.run import find_model, tree_sha256
from plinth.tasks import reviews

if TYPE_CHECKING:
    from plinth.models.reward import RewardModel
    from plinth.posttraining.reward import LoadedReward

Rule = Callable[[Prompt, str], float]
"""(prompt, text of the answer) -> reward; NaN where it cannot be told"""
PATTERN = "format:"
"""what stands before a regular expression that answers must hold"""


def by_verifier(name: str | None, default: str = DEFAULT_VERIFIER) -> Rule:
    """Return the rule of a verifier, or without a name of the one that each prompt names, `default` where it names none."""
    return lambda prompt, answer: verify(name or prompt.verifier or default, answer, prompt.answer or "")


RULES: dict[str, Rule] = {
    "verifier": by_verifier(None),
    **{name: by_verifier(name) for name in VERIFIERS},
    "reviews": lambda prompt, answer: reviews.reward(prompt.text, answer),
}
"""rewards that are known rules, by name"""


def is_rule(name: str) -> bool:
    """Say whether a name is that of a known rule."""
    return name in RULES or name.startswith(PATTERN)


def find_rule(name: str, verifier: str = DEFAULT_VERIFIER) -> Rule:
    """Return what a name of RULES, or a pattern behind format:, rewards; `verifier` is for prompts that name none.

    Raises UserError for a name that is none, and for a pattern that cannot be read.
    """
    check_name(verifier)
    if name.startswith(PATTERN):
        pattern = name.removeprefix(PATTERN)
        verify("regex", "", pattern)
        return lambda prompt, answer: verify("regex", answer, pattern)
    if name not in RULES:
        raise UserError(f"reward={name!r} is none of {', '.join(RULES)} and {PATTERN}PATTERN.{nearest(name, RULES)}")
    return by_verifier(None, verifier) if name == "verifier" else RULES[name]


def check_prompts(name: str, prompts: Sequence[Prompt], verifier: str = DEFAULT_VERIFIER) -> None:
    """Raise UserError where a rule compares with answers and a prompt has none, or one that its verifier cannot read."""
    for prompt in prompts if name == "verifier" or name in VERIFIERS else ():
        judge = name if name in VERIFIERS else prompt.verifier or verifier
        check_name(judge)
        if prompt.answer is None and judge != "refusal":
            raise UserError(f"reward={name!r} compares with an answer ({judge}), and the prompt {prompt.text[:60]!r} comes with none.")
        check_answer(judge, prompt.answer or "")


class RewardSource(Protocol):
    """Gives answers their scores."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a prompt whose answers it cannot score."""
        ...

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return the score of each answer to its prompt."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what tells this reward from others, for the resume."""
        ...


@dataclass(frozen=True)
class RuleReward:
    """A known rule (`find_rule`)."""

    name: str
    """its name"""
    verifier: str = DEFAULT_VERIFIER
    """verifier of prompts that name none"""

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_prompts(self.name, prompts, self.verifier)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        rule = find_rule(self.name, self.verifier)
        return [rule(prompt, answer) for prompt, answer in zip(prompts, answers)]

    def identity(self) -> dict[str, Any]:
        return {"reward": self.name}


@dataclass(frozen=True)
class LearntReward:
    """A reward model."""

    loaded: LoadedReward
    """the model with its tokenizer"""
    folder: Path
    """where it was loaded from"""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Any prompt will do."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return self.loaded.score([prompt.messages for prompt in prompts], answers)

    def identity(self) -> dict[str, Any]:
        return {"reward": "learnt", "reward_sha256": tree_sha256(self.folder)}

    @property
    def model(self) -> RewardModel:
        return self.loaded.model


def open_rule(name: str, verifier: str = DEFAULT_VERIFIER) -> RuleReward:
    """Return a rule by its name. Raises UserError for one that there is not."""
    find_rule(name, verifier)
    return RuleReward(name, verifier)


def open_reward(spec: str, device: str = "cpu", verifier: str = DEFAULT_VERIFIER) -> RewardSource:
    """Return the known rule that `spec` names, else the reward model in the run or folder that it names."""
    if is_rule(spec):
        return open_rule(spec, verifier)
    if not Path(spec).exists():
        raise UserError(f"reward={spec!r} is neither a run of a reward model nor a known rule ({', '.join(RULES)}).{nearest(spec, RULES)}")
    from plinth.posttraining.reward import load_reward

    return LearntReward(load_reward(Path(spec), device=device), find_model(Path(spec)))
