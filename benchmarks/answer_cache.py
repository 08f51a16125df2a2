"""How often does the answer cache, asked for likeness, give the answer to another question?

    python benchmarks/answer_cache.py [--names 300] [--seed 0]

Questions about the functions of this Python's standard library, each as one phrasing, are kept with their answers. Then three kinds are
asked: the same with a small edit (case, punctuation, a polite word) and the same in other words, where a hit is what the option is for,
and questions that nobody asked before (other functions, or another fact of the same function, in the words of the kept ones), where a
hit is false. No model runs: what is kept is the question's number.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plinth.inference.answer_cache import AnswerCache
from plinth.inference.request import Event
from plinth.inference.sampling_params import SamplingParams
from plinth.tasks.extraction import candidate_subjects
from plinth.tasks.phrasing import EVALUATION, TRAIN
from plinth.tasks.python_objects import read_library
from plinth.tokenizer.train import train_tokenizer
from record import write_record

THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
EDITS = (str.lower, str.rstrip, lambda text: text.rstrip("?."), lambda text: f"Please: {text}", lambda text: f"{text} Thank you.")
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Question:
    """A question about a fact, in some words."""

    fact: int
    """number of the fact: what the answer is"""
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=300, help="functions whose questions are kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kept, asked = questions(arguments.names, random.Random(arguments.seed))
    tokenizer = train_tokenizer([question.text for question in (*kept, *asked["reworded"])], vocab_size=2048)
    rows = [measure(threshold, kept, asked, tokenizer) for threshold in THRESHOLDS]
    for row in rows:
        print(row)
    write_record("answer_cache", "How often does the answer cache, asked for likeness, give the answer to another question?", rows)
    return 0


def questions(count: int, rng: random.Random) -> tuple[list[Question], dict[str, list[Question]]]:
    """Return the questions that are kept, and those that are asked: the same edited, the same in other words, and about other facts."""
    subjects = rng.sample(candidate_subjects(read_library(), max_chars=80, max_name_chars=48), 2 * count)
    facts = [(subject.item.subject, fact.kind) for subject in subjects[:count] for fact in subject.facts]
    others = [(subject.item.subject, fact.kind) for subject in subjects[count:] for fact in subject.facts]
    rng.shuffle(facts)
    asked, unasked = facts[: len(facts) // 2], facts[len(facts) // 2 :] + others  # the other half: other facts of the same functions

    def ask(pairs, first, phrasings):
        return [Question(first + i, rng.choice(phrasings[kind]).format(name=name)) for i, (name, kind) in enumerate(pairs)]

    kept = ask(asked, 0, TRAIN)
    edited = [Question(question.fact, rng.choice(EDITS)(question.text)) for question in kept]
    return kept, {"edited": edited, "reworded": ask(asked, 0, EVALUATION), "new": ask(unasked, len(asked), TRAIN)}


def measure(threshold: float, kept: list[Question], asked: dict[str, list[Question]], tokenizer) -> dict:
    """Return the shares of questions that get their own answer, and another's, at one threshold."""
    row: dict = {"min_likeness": threshold, "kept": len(kept)}
    with tempfile.TemporaryDirectory() as folder:
        cache = AnswerCache(Path(folder) / "answers.db", {"model": "none"}, min_likeness=threshold)
        for question in kept:
            cache.put(tokenizer.encode(question.text), GREEDY, [Event(0, question.fact, 0.0, [], "stop")])
        for kind, group in asked.items():
            right, wrong = answers(cache, group, tokenizer)
            row[kind] = {"n": len(group), "right": right / len(group), "wrong": wrong / len(group)}
        cache.close()
    return row


def answers(cache: AnswerCache, asked: list[Question], tokenizer) -> tuple[int, int]:
    """Return how many questions got their own fact's answer, and how many another's."""
    right = wrong = 0
    for question in asked:
        events = cache.get(tokenizer.encode(question.text), GREEDY)
        if events is not None:
            right += events[0].token == question.fact
            wrong += events[0].token != question.fact
    return right, wrong


if __name__ == "__main__":
    raise SystemExit(main())
