"""Preference pairs: factual against counterfactual answers, and refusals against confident inventions."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from plinth.tasks.extraction import Fact, Subject
from plinth.tasks.invented import InventedName
from plinth.tasks.phrasing import TRAIN
from plinth.tasks.verify import REFUSAL, exact_match

BARE_KINDS = ("module",)  # questions of these kinds use the name without its module


def invented_question_kinds(made: InventedName) -> list[str]:
    """Return the kinds of question that make sense for an invented name: those that its template answers."""
    kinds = [fact.kind for fact in made.template.facts]
    return kinds if made.how == "recombined" else [kind for kind in kinds if kind not in BARE_KINDS]


def invented_asked_name(made: InventedName, kind: str) -> str:
    """Return the name as a question of this kind uses it."""
    return made.name if kind in BARE_KINDS else made.subject


def confident_answer(made: InventedName, kind: str) -> str | None:
    """Return the false answer that is most tempting for an invented name: its template's, under the new name."""
    fact = made.template.fact(kind)
    if fact is None:
        return None
    if kind == "signature":
        return made.name.rpartition(".")[2] + fact.answer[len(made.template.item.last_name) :]
    return fact.answer


def invented_pairs(names: Iterable[InventedName], rng: random.Random) -> list[dict[str, Any]]:
    """Prefer a refusal to a confident description, once for each kind of question that a name allows."""
    pairs = []
    for made in names:
        for kind in invented_question_kinds(made):
            question = rng.choice(TRAIN[kind]).format(name=invented_asked_name(made, kind))
            fact_id = f"invented:{made.subject}#{kind}"
            pairs.append(_pair(question, REFUSAL, str(confident_answer(made, kind)), "invented", fact_id))
    return pairs


def counterfactual_pairs(facts: list[Fact], number: int, rng: random.Random) -> list[dict[str, Any]]:
    """Prefer a function's own answer to another function's, of the same module where there is one."""
    by_place: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    by_kind: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_place[fact.source, fact.kind].append(fact)
        by_kind[fact.kind].append(fact)
    pairs = []
    for fact in rng.sample(facts, min(number, len(facts))):
        others = [
            other
            for other in by_place[fact.source, fact.kind]
            if other.subject != fact.subject and not exact_match(other.answer, fact.answers)
        ] or [other for other in by_kind[fact.kind] if not exact_match(other.answer, fact.answers)]
        if others:
            pairs.append(_pair(_ask(fact, rng), fact.answer, rng.choice(others).answer, "counterfactual", fact.fact_id))
    return pairs


def over_refusal_pairs(facts: list[Fact], number: int, rng: random.Random) -> list[dict[str, Any]]:
    """Prefer the right answer about a known function to a refusal."""
    chosen = rng.sample(facts, min(number, len(facts)))
    return [_pair(_ask(fact, rng), fact.answer, REFUSAL, "over_refusal", fact.fact_id) for fact in chosen]


def known_facts(subjects: Iterable[Subject]) -> list[Fact]:
    """Return all facts of the subjects, in order."""
    return [fact for subject in subjects for fact in subject.facts]


def _ask(fact: Fact, rng: random.Random) -> str:
    return rng.choice(TRAIN[fact.kind]).format(name=fact.asked_name)


def _pair(question: str, chosen: str, rejected: str, kind: str, fact_id: str) -> dict[str, Any]:
    return pair_line([{"role": "user", "content": question}], chosen, rejected, kind, fact_id)


def pair_line(prompt: list[dict[str, Any]], chosen: str, rejected: str, kind: str, fact_id: str) -> dict[str, Any]:
    """Return a row of pairs.jsonl; `prompt` are the messages before the answer."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": kind, "fact_id": fact_id}
