"""Beam search and best-of-n for `plinth generate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from plinth.config import UserError


@dataclass(frozen=True)
class SearchOptions:
    """More computation for a better answer."""

    beams: int | None = None
    """search for the most probable answer with this many beams, instead of drawing one"""
    length_penalty: float = 1.0
    """with --beams: an answer's log-probability is divided by its length to this power"""
    early_stopping: Literal["true", "false", "never"] = "false"
    """with --beams: stop when as many answers have ended (true), when no better one is likely (false) or possible (never)"""
    beam_groups: int = 1
    """with --beams: groups of beams that search for themselves"""
    diversity_penalty: float = 0.0
    """with --beam-groups: nats taken off a token that an earlier group has taken at the same place"""
    best_of: int | None = None
    """draw this many answers and print the best"""
    select: Literal["mean-logprob", "total-logprob", "vote"] = "mean-logprob"
    """with --best-of: the best is that of the highest log-probability a token or in all, or the most frequent text"""

    def check(self) -> None:
        """Raise UserError where options contradict one another."""
        if self.beams is not None and self.best_of is not None:
            raise UserError("--beams and --best-of are two ways to choose an answer. Give one of them.")
        for name, default in (("length_penalty", 1.0), ("early_stopping", "false"), ("beam_groups", 1), ("diversity_penalty", 0.0)):
            if self.beams is None and getattr(self, name) != default:
                raise UserError(f"--{name.replace('_', '-')} needs --beams.")
        if self.best_of is not None and self.best_of < 1:
            raise UserError(f"--best-of {self.best_of} must be at least 1.")
        if self.beams is not None:
            self.beam_params(1)

    @property
    def answers_each(self) -> int:
        """Sequences that run at once for each prompt."""
        return self.beams or self.best_of or 1

    def beam_params(self, max_tokens: int):
        """Return the parameters of the search."""
        from plinth.inference.beam import BeamParams

        early = {"true": True, "false": False, "never": "never"}[self.early_stopping]
        return BeamParams(
            num_beams=1 if self.beams is None else self.beams,
            max_tokens=max_tokens,
            length_penalty=self.length_penalty,
            early_stopping=early,  # type: ignore[arg-type]
            num_groups=self.beam_groups,
            diversity_penalty=self.diversity_penalty,
        )


def search_beams(text, prompts: list[list[int]], options: SearchOptions, max_tokens: int) -> list[Any]:
    """Return the best beam of each prompt as a completion without log-probabilities a token, and its score as `score`."""
    from plinth.inference.beam import beam_search
    from plinth.inference.text import TextCompletion, end_ids

    engine = text.engine
    with engine.search() as space:
        ends = {*engine.eos_ids, *end_ids(text.tokenizer)}
        found = beam_search(space, prompts, options.beam_params(max_tokens), ends, max_seq_len=engine.max_seq_len)
    return [
        (TextCompletion(text.tokenizer.decode(best.tokens), [], [], [], best.finish_reason, len(prompt)), asdict(best))
        for prompt, (best, *_) in zip(prompts, found)
    ]


def choose_best(text, prompts: list[list[int]], params, options: SearchOptions) -> list[Any]:
    """Return for each prompt the best of several completions, and what was spent on it."""
    from plinth.inference import best_of

    chosen = []
    config = text.engine.runner.config
    for i, prompt in enumerate(prompts):
        seeded = params if params.seed is None else replace(params, seed=params.seed + i * options.best_of)
        samples = best_of.sample(text, prompt, options.best_of, seeded)
        facts: dict[str, Any] = {"cost": asdict(best_of.cost_of(samples, config))}
        if options.select == "vote":
            vote = best_of.majority_vote(samples)
            facts |= {"share": vote.share}
            best = next((sample for sample in samples if sample.text.strip() == vote.answer), samples[0])
        else:
            best = best_of.best_of(samples, best_of.mean_logprob if options.select == "mean-logprob" else best_of.total_logprob)
        chosen.append((best, facts))
    return chosen
