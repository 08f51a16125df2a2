"""More computation for a better answer: several completions of one prompt, and the ways to settle on one of them.

The prompt is read once for all of them. What each choice cost is told beside it: tokens read and written, and operations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams, fresh_seed
from plinth.inference.text import Prompt, TextCompletion, TextEngine
from plinth.models.config import DecoderConfig
from plinth.models.cost import forward_flops_per_token

Scorer = Callable[[TextCompletion], float]  # a reward model, a verifier or a log-probability: higher is better


@dataclass(frozen=True)
class Cost:
    """What completions took."""

    prompt_tokens: int = 0
    """prompt tokens that were read, once for all completions of a prompt"""
    completion_tokens: int = 0
    """tokens that were written"""
    flops: int = 0
    """multiplications and additions of the model for both; 0 where its shape is not given"""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens, self.flops + other.flops)


def sample(text: TextEngine, prompt: Prompt, n: int, params: SamplingParams | None = None) -> list[TextCompletion]:
    """Return n completions of a prompt, number i with the seed + i."""
    if n < 1:
        raise UserError(f"n={n} must be at least 1.")
    params = params or SamplingParams()
    seed = fresh_seed() if params.seed is None else params.seed
    return text.complete([prompt] * n, replace(params, seed=seed))


def cost_of(completions: Sequence[TextCompletion], config: DecoderConfig | None = None) -> Cost:
    """Return what completions of one prompt took together."""
    if not completions:
        return Cost()
    prompt, written = completions[0].prompt_tokens, [len(completion.tokens) for completion in completions]
    if config is None:
        return Cost(prompt, sum(written))
    flops = prompt * forward_flops_per_token(config, prompt)
    flops += sum(count * forward_flops_per_token(config, prompt + count) for count in written)
    return Cost(prompt, sum(written), flops)


def total_logprob(completion: TextCompletion) -> float:
    """Return the log-probability of a completion in nats; short answers have the advantage, an empty one is certain."""
    return sum(completion.logprobs)


def mean_logprob(completion: TextCompletion) -> float:
    """Return the log-probability a token in nats, which is fair to long answers; an empty one has -inf."""
    return sum(completion.logprobs) / len(completion.logprobs) if completion.logprobs else -float("inf")


def best_of(completions: Sequence[TextCompletion], score: Scorer) -> TextCompletion:
    """Return the completion of the highest score, the first among equals."""
    if not completions:
        raise UserError("there is no completion to choose from.")
    return max(completions, key=score)


def best_of_kl(n: int) -> float:
    """Return log n − (n−1)/n: nats between the best of n and the sampler, where no two completions have one score; else no more.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; Beirami et al. 2024, arXiv:2401.01879, for the bound.
    """
    if n < 1:
        raise UserError(f"n={n} must be at least 1.")
    return math.log(n) - (n - 1) / n


def best_of_mean(scores: Sequence[float], n: int) -> float:
    """Return the mean score of the best of n, without bias, from len(scores) ≥ n completions: over all choices of n of them."""
    if not 1 <= n <= len(scores):
        raise UserError(f"n={n} is not between 1 and {len(scores)}, the number of scores.")
    chances = [math.comb(i, n - 1) / math.comb(len(scores), n) for i in range(len(scores))]
    return math.fsum(chance * score for chance, score in zip(chances, sorted(scores)))


@dataclass(frozen=True)
class Vote:
    """What completions agree on."""

    answer: Hashable | None
    """the answer with the most weight, among equals the one that came first; None where none gives an answer"""
    share: float
    """its share of all weight"""
    weights: dict[Hashable, float]
    """weight of every answer"""


def majority_vote(
    completions: Sequence[TextCompletion],
    answer: Callable[[str], Hashable | None] = str.strip,
    score: Scorer | None = None,
) -> Vote:
    """Return the most frequent answer, or the one of the greatest summed score; `answer` takes it out of a text, None = no answer.

    Source: Wang et al. 2022, "Self-consistency improves chain of thought reasoning", arXiv:2203.11171, equation 1 and table 1.
    Raises UserError for a negative score: weights are shares.
    """
    weights: dict[Hashable, float] = defaultdict(float)
    for completion in completions:
        found = answer(completion.text)
        weight = 1.0 if score is None else float(score(completion))
        if weight < 0:
            raise UserError(
                f"the score {weight} of a completion is negative and cannot weigh its vote. Return 0 or more, such as exp(score)."
            )
        if found is not None:
            weights[found] += weight
    total = sum(weights.values())
    if not weights:
        return Vote(None, 0.0, {})
    winner = max(weights, key=weights.__getitem__)
    return Vote(winner, weights[winner] / total if total else 0.0, dict(weights))


@dataclass(frozen=True)
class Partial:
    """A completion that is written step by step."""

    tokens: list[int]
    """token ids, with those that end its steps"""
    score: float
    """what the scorer says of it"""
    ended: bool
    """whether the model ended it, or no room is left"""


@dataclass(frozen=True)
class StepSearch:
    """How to search by steps."""

    keep: int = 4
    """partial completions that are kept after each step"""
    expand: int = 4
    """continuations drawn for each of them"""
    max_steps: int = 16
    """steps at most"""
    max_step_tokens: int = 64
    """tokens of a step at most"""

    def __post_init__(self) -> None:
        for name in ("keep", "expand", "max_steps", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")


def search_by_steps(
    engine: Engine,
    prompt: Sequence[int],
    score: Callable[[list[int]], float],
    step_ends: Sequence[int],
    search: StepSearch | None = None,
    params: SamplingParams | None = None,
) -> tuple[list[Partial], Cost]:
    """Write a completion step by step, keeping the partial ones that `score` (of their tokens) likes best; best first, and the cost.

    A step ends with a token of step_ends, which is part of it. Every step of every partial completion shares the one reading of what
    is before it. With keep=1 this is best-of-n a step, with expand=1 it is plain sampling.
    Source: Snell et al. 2024, "Scaling LLM test-time compute optimally", arXiv:2408.03314, section 5.1 (beam search against a verifier).
    """
    search, params = search or StepSearch(), params or SamplingParams()
    seed = fresh_seed() if params.seed is None else params.seed
    kept, cost = [Partial([], score([]), False)], Cost(len(prompt))
    for step in range(search.max_steps):
        running = [partial for partial in kept if not partial.ended]
        if not running:
            break
        parents = [partial for partial in running for _ in range(search.expand)]
        first = seed + step * search.keep * search.expand
        each = [replace(params, seed=first + i, max_tokens=search.max_step_tokens, min_tokens=0, stop=()) for i in range(len(parents))]
        written = _write_steps(engine, [[*prompt, *parent.tokens] for parent in parents], each, frozenset(step_ends))
        cost += Cost(0, sum(len(tokens) for tokens, _ in written))
        children = [partial for partial in kept if partial.ended]
        for parent, (tokens, ended) in zip(parents, written):
            whole = parent.tokens + tokens
            children.append(Partial(whole, score(whole), ended or len(prompt) + len(whole) >= engine.max_seq_len))
        kept = _distinct(sorted(children, key=lambda partial: -partial.score))[: search.keep]
    return kept, cost


def _write_steps(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams], step_ends: frozenset[int]
) -> list[tuple[list[int], bool]]:
    """Return for each prompt the tokens of one more step and whether the completion ends with it."""
    written: list[tuple[list[int], bool]] = [([], True)] * len(prompts)
    places: dict[int, int] = {}
    try:
        for i, (prompt, each) in enumerate(zip(prompts, params)):
            places[engine.add(prompt, replace(each, stop_token_ids=(*each.stop_token_ids, *step_ends)))] = i
        tokens: dict[int, list[int]] = {request: [] for request in places}
        waiting = set(places)
        while waiting:
            for event in engine.step():
                if event.id not in waiting:
                    continue
                is_step_end = event.finish_reason == "stop" and event.token in step_ends
                if event.finish_reason != "stop" or is_step_end:
                    tokens[event.id].append(event.token)
                if event.finish_reason:
                    waiting.discard(event.id)
                    written[places[event.id]] = (tokens[event.id], event.finish_reason == "stop" and not is_step_end)
    finally:
        for request in places:
            engine.cancel(request)
    return written


def _distinct(partials: list[Partial]) -> list[Partial]:
    seen: dict[tuple[int, ...], Partial] = {}
    for partial in partials:
        seen.setdefault(tuple(partial.tokens), partial)
    return list(seen.values())
