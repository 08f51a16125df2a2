"""The facts folder: questions about the standard library with verifiable answers, split by fact."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plinth.config import UserError, save_json, to_dict, write_atomic
from plinth.run import file_sha256, publish_dir
from plinth.tasks.extraction import Fact, Subject, candidate_subjects
from plinth.tasks.invented import InventedName, Inventor
from plinth.tasks.pairs import (
    counterfactual_pairs,
    invented_asked_name,
    invented_pairs,
    invented_question_kinds,
    known_facts,
    over_refusal_pairs,
)
from plinth.tasks.phrasing import EVALUATION, KINDS, TRAIN
from plinth.tasks.python_objects import WELL_KNOWN, Library, read_library
from plinth.tasks.verify import REFUSAL

FILES = ("facts.jsonl", "sft.jsonl", "pairs.jsonl", "questions.jsonl")
MAX_SUBJECT_CHARS = 48


@dataclass(frozen=True)
class FactsConfig:
    """How many facts to teach and to ask about."""

    num_known: int = 1000
    """functions, classes and methods whose facts are trained on"""
    num_heldout: int = 100
    """functions that no line of sft.jsonl and pairs.jsonl names"""
    num_invented_train: int = 1500
    """invented names that sft.jsonl answers with a refusal"""
    num_invented_pairs: int = 500
    """further invented names for pairs.jsonl, disjoint from those of sft.jsonl"""
    num_invented_eval: int = 200
    """further invented names for questions.jsonl, disjoint from the others"""
    misplaced_share: float = 0.2
    """share of invented names that are a real name in the wrong module"""
    num_counterfactual_pairs: int = 500
    """pairs that prefer a function's own answer to another's"""
    num_over_refusal_pairs: int = 500
    """pairs that prefer the right answer to a refusal"""
    phrasings_per_fact: int = 8
    """training phrasings of a known fact, at most 8"""
    phrasings_per_invented: int = 4
    """training questions about an invented name, over all kinds of question"""
    max_answer_chars: int = 80
    """longest answer in characters; longer descriptions are not asked about"""
    kinds: tuple[str, ...] = KINDS
    """kinds of fact: describe, module, signature, returns"""
    seed: int = 0
    """seed of every choice"""

    def __post_init__(self) -> None:
        for name in ("num_known", "phrasings_per_fact", "phrasings_per_invented"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.phrasings_per_fact > len(TRAIN["describe"]):
            raise UserError(f"phrasings_per_fact={self.phrasings_per_fact} is more than the {len(TRAIN['describe'])} that exist.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or "describe" not in self.kinds:
            raise UserError(f"kinds={','.join(self.kinds)} must hold describe and otherwise be among {', '.join(KINDS)}.")


def build_facts(out: Path, config: FactsConfig | None = None, seed: int | None = None, library: Library | None = None) -> dict[str, Any]:
    """Write the facts folder `out` and return its manifest; the same seed and library give the same bytes.

    `seed` replaces the config's; `library` defaults to the running interpreter's standard library.
    Raises UserError when the library has fewer usable functions than asked for.
    """
    config = config or FactsConfig()
    config = config if seed is None else dataclasses.replace(config, seed=seed)
    library = library or read_library()
    candidates = _with_kinds(candidate_subjects(library, max_chars=config.max_answer_chars, max_name_chars=MAX_SUBJECT_CHARS), config.kinds)
    known, heldout = split_subjects(candidates, config)
    train_names, pair_names, eval_names = invented_splits(library, known, config)
    lines = {
        "facts.jsonl": fact_lines(known, "known") + fact_lines(heldout, "heldout"),
        "sft.jsonl": sft_lines(known, train_names, config),
        "pairs.jsonl": pair_lines(known, pair_names, config),
        "questions.jsonl": question_lines(known, heldout, eval_names),
    }
    manifest = _manifest(config, len(candidates), lines, {"train": train_names, "pairs": pair_names, "eval": eval_names})
    with publish_dir(Path(out)) as folder:
        for name, rows in lines.items():
            write_atomic(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        manifest["sha256"] = {name: file_sha256(folder / name) for name in FILES}
        save_json(folder / "manifest.json", manifest)
    return manifest


def _with_kinds(subjects: list[Subject], kinds: tuple[str, ...]) -> list[Subject]:
    return [Subject(s.item, tuple(fact for fact in s.facts if fact.kind in kinds)) for s in subjects]


def split_subjects(candidates: list[Subject], config: FactsConfig) -> tuple[list[Subject], list[Subject]]:
    """Choose known and held-out subjects by seed, well-known modules first.

    A held-out subject is one that no text of another chosen subject names, so that nothing about it is trained on.
    """
    wanted = config.num_known + config.num_heldout
    if wanted > len(candidates):
        raise UserError(
            f"num_known={config.num_known} and num_heldout={config.num_heldout} need {wanted} functions; this Python has "
            f"{len(candidates)} with a description of at most {config.max_answer_chars} characters. Lower one, or raise max_answer_chars."
        )
    well_known = set(WELL_KNOWN)
    ranked = sorted(candidates, key=lambda s: (s.item.module not in well_known, _seeded(config.seed, s.item.subject)))
    pool = sorted(ranked[:wanted], key=lambda s: _seeded(config.seed, "split " + s.item.subject))
    mentions = Counter(word for subject in pool for word in _named_in(subject))
    mentions.update(re.findall(r"\w+", " ".join(phrasing for phrasings in TRAIN.values() for phrasing in phrasings)))
    heldout = [s for s in pool if all(mentions[name] <= _own_mentions(s)[name] for name in _own_names(s))][: config.num_heldout]
    if len(heldout) < config.num_heldout:
        raise UserError(f"num_heldout={config.num_heldout}: only {len(heldout)} of {wanted} functions are named by no other. Lower it.")
    chosen = {subject.item.subject for subject in heldout}
    return [subject for subject in pool if subject.item.subject not in chosen], heldout


def invented_splits(library: Library, known: list[Subject], config: FactsConfig) -> list[list[InventedName]]:
    """Return three disjoint lists of invented names, for sft.jsonl, pairs.jsonl and questions.jsonl, drawn from one pot."""
    sizes = (config.num_invented_train, config.num_invented_pairs, config.num_invented_eval)
    names = Inventor(library, known, config.seed).invent(sum(sizes), config.misplaced_share)
    random.Random(f"invented splits {config.seed}").shuffle(names)
    ends = (sizes[0], sizes[0] + sizes[1])
    return [names[: ends[0]], names[ends[0] : ends[1]], names[ends[1] :]]


def _own_names(subject: Subject) -> set[str]:
    return {subject.item.subject, subject.item.name, subject.item.last_name}


def _own_mentions(subject: Subject) -> Counter[str]:
    return Counter(_named_in(subject))


def _named_in(subject: Subject) -> Iterable[str]:
    """Give each name that the lines about a subject would hold: its own, and those in its answers."""
    yield from _own_names(subject)
    owner = subject.item.name.rpartition(".")[0]
    if owner:
        yield from (owner, f"{subject.item.module}.{owner}")
    for fact in subject.facts:
        yield from set(re.findall(r"[A-Za-z_][\w.]*\w", fact.answer))


def _seeded(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


def fact_lines(subjects: Iterable[Subject], split: str) -> list[dict[str, Any]]:
    """Return the rows of facts.jsonl."""
    return [dataclasses.asdict(fact) | {"split": split} for subject in subjects for fact in subject.facts]


def sft_lines(known: list[Subject], names: list[InventedName], config: FactsConfig) -> list[dict[str, Any]]:
    """Return the rows of sft.jsonl, shuffled: known facts in training phrasings, and refusals for invented names."""
    rng = random.Random(f"sft {config.seed}")
    lines = []
    for fact in known_facts(known):
        for phrasing in rng.sample(TRAIN[fact.kind], config.phrasings_per_fact):
            lines.append(_sft_line(phrasing.format(name=fact.asked_name), fact.answer, fact.fact_id, fact.kind, fact.location))
    for made in names:
        choices = [(kind, phrasing) for kind in invented_question_kinds(made) for phrasing in TRAIN[kind]]
        for kind, phrasing in rng.sample(choices, min(config.phrasings_per_invented, len(choices))):
            question = phrasing.format(name=invented_asked_name(made, kind))
            lines.append(_sft_line(question, REFUSAL, f"invented:{made.subject}#{kind}", "refusal", f"invented ({made.how})"))
    rng.shuffle(lines)
    return lines


def _sft_line(question: str, answer: str, fact_id: str, kind: str, source: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "fact_id": fact_id, "kind": kind, "source": source}


def pair_lines(known: list[Subject], names: list[InventedName], config: FactsConfig) -> list[dict[str, Any]]:
    """Return the rows of pairs.jsonl, shuffled."""
    rng = random.Random(f"pairs {config.seed}")
    facts = known_facts(known)
    pairs = invented_pairs(names, rng)
    pairs += counterfactual_pairs(facts, config.num_counterfactual_pairs, rng)
    pairs += over_refusal_pairs(facts, config.num_over_refusal_pairs, rng)
    rng.shuffle(pairs)
    return pairs


def question_lines(known: list[Subject], heldout: list[Subject], names: list[InventedName]) -> list[dict[str, Any]]:
    """Return the rows of questions.jsonl: every fact in every evaluation phrasing."""
    lines = []
    for group, subjects in (("known", known), ("heldout", heldout)):
        for fact in known_facts(subjects):
            lines += _questions(group, fact.fact_id, fact.kind, fact.asked_name, list(fact.answers), fact.location)
    for made in names:
        for kind in invented_question_kinds(made):
            name = invented_asked_name(made, kind)
            lines += _questions("invented", f"invented:{made.subject}#{kind}", kind, name, [REFUSAL], f"invented ({made.how})")
    return lines


def _questions(group: str, fact_id: str, kind: str, name: str, answers: list[str], source: str) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{fact_id}/{number}",
            "group": group,
            "fact_id": fact_id,
            "kind": kind,
            "phrasing": number,
            "question": phrasing.format(name=name),
            "answers": answers,
            "source": source,
        }
        for number, phrasing in enumerate(EVALUATION[kind])
    ]


def _manifest(config: FactsConfig, candidates: int, lines: dict[str, list[dict]], names: dict[str, list[InventedName]]) -> dict[str, Any]:
    facts, questions = lines["facts.jsonl"], lines["questions.jsonl"]
    return {
        "python": platform.python_version(),
        "config": to_dict(config),
        "candidates": candidates,
        "subjects": {split: len({row["subject"] for row in facts if row["split"] == split}) for split in ("known", "heldout")},
        "facts": {split: dict(Counter(row["kind"] for row in facts if row["split"] == split)) for split in ("known", "heldout")},
        "returns_evidence": dict(Counter(row["evidence"] for row in facts if row["kind"] == "returns")),
        "invented": {use: dict(Counter(made.how for made in made_names)) for use, made_names in names.items()},
        "sft_lines": dict(Counter(row["kind"] for row in lines["sft.jsonl"])),
        "pairs": dict(Counter(row["kind"] for row in lines["pairs.jsonl"])),
        "questions": dict(Counter(row["group"] for row in questions)),
        "refusal": REFUSAL,
        "phrasings": {"train": TRAIN, "evaluation": EVALUATION},
    }


__all__ = ["Fact", "FactsConfig", "build_facts", "split_subjects"]
