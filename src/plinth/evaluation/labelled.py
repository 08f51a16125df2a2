"""How right labels, tags and answers are: accuracy and macro F1, F1 of entities, exact match and F1 of answers, with intervals."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from plinth.evaluation.statistics import Score, bootstrap_ratio, mean_score


def score_labels(found: Sequence[str], right: Sequence[str]) -> dict[str, Score]:
    """Return accuracy, and the share that the commonest label alone would reach (majority)."""
    protocol = {"task": "classify"}
    commonest = Counter(right).most_common(1)[0][0]
    return {
        "accuracy": mean_score([float(a == b) for a, b in zip(found, right, strict=True)], protocol=protocol),
        "majority": mean_score([float(commonest == b) for b in right], protocol=protocol),
    }


def macro_f1(found: Sequence[str], right: Sequence[str]) -> float:
    """Return the mean over the labels of 2 hits / (times said + times right)."""
    said, due = Counter(found), Counter(right)
    hits = Counter(a for a, b in zip(found, right, strict=True) if a == b)
    return sum(2 * hits[label] / (said[label] + due[label]) for label in due | said) / len(due | said)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities that tags mark, as (name, first word, word behind the last).

    B-NAME begins one; I-NAME goes on with one of the same name, and begins one where there is none to go on with, as the program of
    the CoNLL-2003 task counts. Tags without a prefix are one word each, but for O.
    """
    found, name, start = set(), "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, rest = tag.partition("-") if tag[:2] in ("B-", "I-") else ("B", "", "" if tag == "O" else tag)
        if name and (prefix == "B" or rest != name):
            found.add((name, start, i))
            name = ""
        if rest and not name:
            name, start = rest, i
    return found


def score_tags(found: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Return the F1 of whole entities, and the share of words with the right tag.

    The interval of F1 is a bootstrap over the sentences. Without any entity, said or right, it is left out.
    """
    hits, sizes, shares, sentences = [], [], [], []
    for number, (a, b) in enumerate(zip(found, right, strict=True)):
        said, due = entities(a), entities(b)
        hits.append(2.0 * len(said & due))
        sizes.append(float(len(said) + len(due)))
        shares += [float(x == y) for x, y in zip(a, b, strict=True)]
        sentences += [number] * len(b)
    scores = {"word_accuracy": mean_score(shares, sentences, {"task": "tag"})}
    if sum(sizes):
        scores["entity_f1"] = bootstrap_ratio(hits, sizes, protocol={"task": "tag", "entities": "exact, CoNLL-2003"})
    return scores


def score_answers(found: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Return exact match and F1 of words against the best of each question's answers; none right means that none is to be found.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1, and 2018, arXiv:1806.03822.
    """
    pairs = [(text, list(answers) or [""]) for text, answers in zip(found, right, strict=True)]
    exact = [max(float(normalised(text) == normalised(answer)) for answer in answers) for text, answers in pairs]
    shared = [max(word_f1(text, answer) for answer in answers) for text, answers in pairs]
    protocol = {"task": "answer", "normalised": "case, punctuation, articles, spaces"}
    scores = {"exact_match": mean_score(exact, protocol=protocol), "f1": mean_score(shared, protocol=protocol)}
    none = [i for i, answers in enumerate(right) if not answers]
    if none:
        scores["exact_match_none"] = replace(mean_score([exact[i] for i in none]), protocol=protocol)
    return scores


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and superfluous spaces."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def word_f1(text: str, answer: str) -> float:
    """Return 2 · shared words / words of both; two texts without words are equal."""
    said, due = Counter(normalised(text).split()), Counter(normalised(answer).split())
    if not said or not due:
        return float(said == due)
    return 2 * sum((said & due).values()) / (sum(said.values()) + sum(due.values()))
