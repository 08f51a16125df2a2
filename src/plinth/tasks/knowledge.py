"""What a model knows by its own sampled answers, and the data that teach it to answer that and to decline the rest.

Source: Zhang et al. 2023, arXiv:2311.09677 (R-Tuning): the training questions are split by the model's own answers. Gekhman et al. 2024,
arXiv:2405.05904, section 3: the split is by the share of sampled answers that are right. Tian et al. 2023, arXiv:2311.08401 (FactTune):
preferences between a model's own samples, by truth or, reference-free, by how often it says the same.
Differs: R-Tuning appends "I am unsure" to the answer, here the refusal takes its place; the split is by fact, over all phrasings of its
question; refusals are bounded, since a model that only sees refusals refuses everything.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plinth.config import UserError
from plinth.tasks.pairs import pair_line
from plinth.tasks.verify import REFUSAL, exact_match, is_refusal, normalize

Split = Literal["known", "between", "unknown"]
Message = dict[str, Any]


@dataclass(frozen=True)
class KnowledgeConfig:
    """How a model is asked what it knows, and what is made of it."""

    samples: int = 8
    """answers drawn to each question"""
    temperature: float = 1.0
    """divisor of the scores"""
    known_share: float = 0.5
    """a fact is known when at least this share of all answers about it is right"""
    unknown_share: float = 0.1
    """a fact is unknown when at most this share is right; what lies between keeps its answer as the target"""
    max_refusal_share: float = 0.3
    """largest share of refusals among the targets of sft.jsonl, against over-refusal"""
    max_refusal_pair_share: float = 0.5
    """largest share of pairs for a refusal in pairs.jsonl; pairs against one are never more"""
    pairs_per_question: int = 2
    """preference pairs at most that one question gives"""
    verifier: str = "exact"
    """how an answer is told right where the data do not say: exact, words, numeric, regex, json, code, sql"""
    reference_free: bool = False
    """take the answer that a fact gets most often for the right one; the targets of the data are not looked at then"""
    max_questions: int | None = None
    """questions at most, whole facts, drawn by seed (default: all)"""
    seed: int = 0
    """seed of the samples and of every choice"""

    def __post_init__(self) -> None:
        for name in ("samples", "pairs_per_question"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.unknown_share < self.known_share <= 1:
            raise UserError(
                f"unknown_share={self.unknown_share} and known_share={self.known_share} must lie in [0, 1], the first below the second."
            )
        for name in ("max_refusal_share", "max_refusal_pair_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 0 or more and below 1.")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature} must be positive: equal answers tell nothing.")


@dataclass(frozen=True)
class Asked:
    """A training question with the answers that a model gave to it."""

    prompt: list[Message]
    """the conversation up to the answer"""
    target: str
    """the answer in the data"""
    fact_id: str
    """what it is about; questions about one fact are judged together"""
    texts: tuple[str, ...]
    """the sampled answers"""
    verifier: str | None = None
    """how an answer is told right, where the data say so"""
    is_checked_only: bool = False
    """whether the target is what an answer is checked against, not an answer that could be learnt"""


@dataclass(frozen=True)
class Judged:
    """A question with what is right about it and how well the model knows it."""

    asked: Asked
    """the question and its samples"""
    answer: str
    """what is taken for right: the target of the data, or the answer given most often"""
    share: float
    """share of right answers among all samples about the fact"""
    split: Split
    """what follows from the share"""
    hits: tuple[bool, ...]
    """of each sampled answer, whether it is right"""

    @property
    def right(self) -> list[str]:
        """Return the sampled answers that are right, each text once, the most frequent first."""
        return _distinct(text for text, hit in zip(self.asked.texts, self.hits) if hit)

    @property
    def wrong(self) -> list[str]:
        """Return the sampled answers that are wrong and no refusals, each text once, the most frequent first."""
        return _distinct(text for text, hit in zip(self.asked.texts, self.hits) if not hit and not is_refusal(text))

    @property
    def to_learn(self) -> str:
        """Return the answer to finetune on: the one taken for right, or the model's own where that is only checked against."""
        return self.right[0] if self.asked.is_checked_only and self.right else self.answer


Verify = Callable[[str, str, str], float]
"""(verifier, text, answer) → 1 for right; inference.verifiers.verify is one"""


def verify_exactly(verifier: str, text: str, answer: str) -> float:
    """Say whether two texts are equal but for case, spaces and trailing punctuation, whatever the verifier."""
    return exact_match(text, [answer])


def judge_knowledge(asked: Sequence[Asked], config: KnowledgeConfig, verify: Verify = verify_exactly) -> list[Judged]:
    """Split questions by the share of right answers to all questions about their fact. A refusal is no right answer.

    Right is what `verify` gives 1; without a reference, what is equal to the answer given most often.
    """
    by_fact: dict[str, list[Asked]] = defaultdict(list)
    for question in asked:
        by_fact[question.fact_id].append(question)
    found: dict[int, Judged] = {}
    for questions in by_fact.values():
        voted = _most_frequent(text for question in questions for text in question.texts) if config.reference_free else None
        answers = [question.target if voted is None else voted for question in questions]
        hits = [_hits(question, answer, config, verify) for question, answer in zip(questions, answers)]
        share = sum(map(sum, hits)) / sum(map(len, hits))
        split: Split = "known" if share >= config.known_share else "unknown" if share <= config.unknown_share else "between"
        found |= {id(question): Judged(question, answer, share, split, hit) for question, answer, hit in zip(questions, answers, hits)}
    return [found[id(question)] for question in asked]


def _hits(question: Asked, answer: str, config: KnowledgeConfig, verify: Verify) -> tuple[bool, ...]:
    if config.reference_free:  # an answer that declines cannot be the one given most often
        return tuple(bool(exact_match(text, [answer])) and not is_refusal(text) for text in question.texts)
    verdicts: dict[str, bool] = {}
    for text in question.texts:
        if text not in verdicts:
            verdicts[text] = not is_refusal(text) and verify(question.verifier or config.verifier, text, answer) >= 1.0
    return tuple(verdicts[text] for text in question.texts)


def refusal_aware_lines(judged: Sequence[Judged], refusals: Sequence[Asked], config: KnowledgeConfig) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of sft.jsonl, shuffled, and how many refusals the bound left out.

    Known facts and those between keep the answer, unknown ones get a refusal; `refusals` are questions whose target is one already.
    Raises UserError when nothing is left to answer.
    """
    rng = random.Random(f"knowledge sft {config.seed}")
    answered = [_example(each.asked, each.to_learn, each.split) for each in judged if each.split != "unknown"]
    declined = [_example(each.asked, REFUSAL, "unknown") for each in judged if each.split == "unknown"]
    declined += [_example(asked, asked.target, "refused in the data") for asked in refusals]
    if not answered:
        raise UserError(
            f"the model answers none of {len(judged)} questions right often enough: the data would be refusals alone. "
            "Train it on some of the facts first, or lower unknown_share."
        )
    kept = bounded(declined, len(answered), config.max_refusal_share, rng)
    lines = answered + kept
    rng.shuffle(lines)
    return lines, len(declined) - len(kept)


def factuality_pairs(judged: Sequence[Judged], config: KnowledgeConfig) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of pairs.jsonl, shuffled, and how many pairs for a refusal the bound left out.

    - factual: a right sampled answer over a wrong one to the same question;
    - unknown: a refusal over a wrong sampled answer, for facts that are unknown;
    - over_refusal: a right answer over a refusal, for facts that are known; no more than pairs for one, or those would come to nothing.
    """
    rng = random.Random(f"knowledge pairs {config.seed}")
    factual: list[dict[str, Any]] = []
    against: list[dict[str, Any]] = []
    refusals: list[dict[str, Any]] = []
    for each in judged:
        question, limit = each.asked, config.pairs_per_question
        if each.split == "unknown":
            refusals += [_pair(question, REFUSAL, wrong, "unknown") for wrong in each.wrong[:limit]]
            continue
        right = each.right[0] if each.right else each.answer
        factual += [_pair(question, right, wrong, "factual") for wrong in each.wrong[:limit]]
        if each.split == "known" and len(each.wrong) < limit:
            against.append(_pair(question, right, REFUSAL, "over_refusal"))
    against = against if len(against) <= len(refusals) else rng.sample(against, len(refusals))
    kept = bounded(refusals, len(factual) + len(against), config.max_refusal_pair_share, rng)
    lines = factual + against + kept
    rng.shuffle(lines)
    return lines, len(refusals) - len(kept)


def bounded(refusals: list[dict[str, Any]], others: int, max_share: float, rng: random.Random) -> list[dict[str, Any]]:
    """Return as many of the refusals, drawn by `rng`, as make up at most `max_share` of themselves and `others` more rows."""
    most = int(max_share * others / (1.0 - max_share) + 1e-9)
    return refusals if len(refusals) <= most else rng.sample(refusals, most)


def _example(asked: Asked, answer: str, kind: str) -> dict[str, Any]:
    return {"messages": [*asked.prompt, {"role": "assistant", "content": answer}], "fact_id": asked.fact_id, "kind": kind}


def _pair(asked: Asked, chosen: str, rejected: str, kind: str) -> dict[str, Any]:
    return pair_line(asked.prompt, chosen, rejected, kind, asked.fact_id)


def _distinct(texts: Iterable[str]) -> list[str]:
    """Return texts that differ when normalised, the most frequent first, as they were first written; empty ones are none."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for text in texts:
        if normalize(text):
            first.setdefault(normalize(text), text)
            counts[normalize(text)] += 1
    return [first[key] for key, _ in counts.most_common()]


def _most_frequent(texts: Iterable[str]) -> str | None:
    found = _distinct(text for text in texts if not is_refusal(text))
    return found[0] if found else None
