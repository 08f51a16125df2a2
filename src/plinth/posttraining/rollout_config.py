"""How completions are sampled and what they are rewarded for, said without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plinth.config import UserError, nearest

if TYPE_CHECKING:
    import torch

    from plinth.posttraining.examples import Prompt
    from plinth.posttraining.reward_sources import Rule

DEFAULT_VERIFIER = "exact"
CONTROLS = ("length", "random")


@dataclass(frozen=True)
class SampleConfig:
    """How completions are sampled."""

    group_size: int = 8
    """completions a prompt"""
    max_tokens: int = 128
    """longest completion in tokens, the one that ends it among them"""
    temperature: float = 1.0
    """divisor of the logits, in sampling and in the log-probabilities that are trained"""
    max_batch: int = 256
    """completions that a thread samples at once"""

    def __post_init__(self) -> None:
        for name in ("group_size", "max_tokens", "max_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be positive: what is always the same teaches nothing.")


@dataclass(frozen=True)
class RewardConfig:
    """Rewards of a completion and their weights."""

    rewards: tuple[str, ...] = ("verifier",)
    """names of reward_sources.RULES: verifier (the one that a row names), a verifier (exact, numeric, ...) or reviews; format:PATTERN (a
    regular expression that the text must hold); and as controls length (share of max-tokens) and random (heads or tails)"""
    weights: tuple[float, ...] | None = None
    """weight of each (default: 1)"""
    verifier: str = DEFAULT_VERIFIER
    """verifier of rows that name none"""

    def __post_init__(self) -> None:
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise UserError(f"rewards={self.rewards} must name at least one reward, each once.")
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise UserError(f"weights={self.weights} are {len(self.weights)} for {len(self.rewards)} rewards. Give one for each.")
        if self.verifier != DEFAULT_VERIFIER:
            from plinth.inference.verifiers import check_name

            check_name(self.verifier)

    @property
    def weights_K(self) -> torch.Tensor:
        """The weights as a tensor (K,)."""
        import torch

        return torch.tensor(self.weights or (1.0,) * len(self.rewards))

    def check_names(self, own: Mapping[str, Rule], problems: Sequence[Prompt]) -> None:
        """Raise UserError for a reward or a row's verifier that there is not."""
        from plinth.posttraining.reward_sources import RULES, check_prompts, find_rule, is_rule

        for name in self.rewards:
            if is_rule(name) and name not in own:
                find_rule(name, self.verifier)
                check_prompts(name, problems, self.verifier)
            elif name not in (known := (*own, *RULES, *CONTROLS)):
                raise UserError(f"reward={name!r} is none of {', '.join(known)}.{nearest(name, known)}")
