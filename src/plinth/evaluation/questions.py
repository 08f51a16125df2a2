"""Questions with verifiable answers: right, refused, made up, and the same whatever the phrasing."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from plinth.config import UserError
from plinth.evaluation.factuality import factuality_scores
from plinth.evaluation.statistics import Score, agreement, mean_score
from plinth.inference.best_of import total_logprob
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextCompletion, TextEngine
from plinth.run import Progress
from plinth.tasks.verify import exact_match, is_refusal, is_right, normalize, token_f1

GROUPS = ("known", "heldout", "invented")
REQUIRED = ("id", "group", "fact_id", "kind", "question", "answers")
NUM_SHOTS = 4
CHUNK = 128  # questions given to the engine at a time, so that progress can be shown
SPARE_TOKENS = 8  # room beyond the longest right answer, so that an answer that goes on is seen to

Style = Literal["chat", "few_shot"]
Question = dict[str, Any]


@dataclass(frozen=True)
class Shot:
    """One worked example of a few-shot prompt."""

    fact_id: str
    question: str
    answer: str


@dataclass(frozen=True)
class QuestionScores:
    """What the answers to a set of questions are worth."""

    scores: dict[str, Score]
    """known_exact, known_f1, over_refusal, consistency, heldout_exact, heldout_f1, heldout_refusal, invented_refusal, invented_false, and
    those of factuality.factuality_scores"""
    by_kind: dict[str, dict[str, Score]]
    """those of one group of questions, for each kind of fact alone"""
    samples: list[dict[str, Any]]
    """every question with the answer that was given"""
    protocol: dict[str, Any]
    """how the questions were asked"""


def read_questions(path: Path) -> list[Question]:
    """Read questions.jsonl. Raises UserError that names the line when a field is missing or a group unknown."""
    questions = []
    for number, record in _read_lines(path):
        missing = [name for name in REQUIRED if name not in record]
        if missing:
            raise UserError(f"{path} line {number} has no {', '.join(missing)}. A question needs {', '.join(REQUIRED)}.")
        if record["group"] not in GROUPS:
            raise UserError(f"{path} line {number}: group={record['group']!r} is not one of {', '.join(GROUPS)}.")
        questions.append(record)
    if not questions:
        raise UserError(f"{path} holds no question.")
    return questions


def read_shots(path: Path) -> list[Shot]:
    """Read the examples of sft.jsonl that a few-shot prompt may show: one user message and one answer, each on one line."""
    shots = []
    for _, record in _read_lines(path):
        messages = record.get("messages", [])
        if [message.get("role") for message in messages] == ["user", "assistant"]:
            question, answer = (message["content"].strip() for message in messages)
            if "\n" not in question + answer:
                shots.append(Shot(str(record.get("fact_id", "")), question, answer))
    return shots


def _read_lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Name a facts folder that holds {Path(path).name}.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not valid JSON: {error.msg}.") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is not an object.")
        yield number, record


def sample_questions(questions: Sequence[Question], max_questions: int | None, seed: int) -> list[Question]:
    """Return at most `max_questions` of each group, all phrasings of whole facts, the facts drawn by seed.

    A group whose first fact has more phrasings than `max_questions` keeps that one fact.
    """
    chosen: list[Question] = []
    for group in GROUPS:
        facts: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            if question["group"] == group:
                facts[question["fact_id"]].append(question)
        order = sorted(facts)
        random.Random(f"questions {group} {seed}").shuffle(order)
        taken: list[Question] = []
        for fact_id in order:
            if max_questions is not None and taken and len(taken) + len(facts[fact_id]) > max_questions:
                break
            taken += facts[fact_id]
        chosen += taken
    return chosen


def choose_shots(shots: Sequence[Shot], asked: Sequence[Question], seed: int, number: int = NUM_SHOTS) -> list[Shot]:
    """Return one refusal and otherwise answers of different kinds, by seed; none is about a subject that is asked about.

    Raises UserError when the examples hold no refusal or too few answers.
    """
    subjects = {question["fact_id"].partition("#")[0] for question in asked}
    free = [shot for shot in shots if shot.fact_id.partition("#")[0] not in subjects]
    rng = random.Random(f"shots {seed}")
    rng.shuffle(free)
    refusals = [shot for shot in free if is_refusal(shot.answer)][:1]
    by_kind: dict[str, list[Shot]] = defaultdict(list)
    for shot in free:
        if not is_refusal(shot.answer):
            by_kind[shot.fact_id.partition("#")[2]].append(shot)
    answers = [bucket[round_] for round_ in range(number) for bucket in by_kind.values() if round_ < len(bucket)]
    chosen = refusals + answers[: number - len(refusals)]
    if not refusals or len(chosen) < number:
        raise UserError(f"a few-shot prompt needs {number} examples with one refusal; {len(chosen)} are left of {len(shots)} in sft.jsonl.")
    rng.shuffle(chosen)
    return chosen


def few_shot_prompt(shots: Sequence[Shot], question: str) -> str:
    """Return the plain-text prompt of a model that never saw the chat format."""
    worked = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{worked}Question: {question}\nAnswer:"


def score_questions(
    text_engine: TextEngine,
    questions: Sequence[Question],
    *,
    style: Style = "chat",
    shots: Sequence[Shot] = (),
    max_questions: int | None = 200,
    seed: int = 0,
) -> QuestionScores:
    """Ask a seeded sample of the questions, greedily, and score the answers with the tasks' own verifier.

    `style` is chat (the question is a user's message) or few_shot (plain text behind four worked examples out of `shots`, fewer where
    the context has no room). A question that does not fit the context by itself counts as answered by nothing; the protocol says how many.
    """
    asked = sample_questions(questions, max_questions, seed)
    tokenizer, limit = text_engine.tokenizer, text_engine.engine.max_seq_len
    longest = max(len(ids) for ids in tokenizer.encode_batch([str(answer) for q in asked for answer in q["answers"]]))
    max_tokens = longest + SPARE_TOKENS
    protocol: dict[str, Any] = {"style": style, "temperature": 0, "max_tokens": max_tokens, "questions": len(asked), "seed": seed}
    protocol |= {"max_questions_per_group": max_questions, "sample": "whole facts, all phrasings", "interval": "Wilson, clustered by fact"}
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    if style == "few_shot":
        chosen = fitting_shots(choose_shots(shots, asked, seed), asked, tokenizer, limit - 1 - max_tokens)
        prefix = [] if tokenizer.start_id is None else [tokenizer.start_id]  # every document begins behind it
        prompts = [prefix + ids for ids in tokenizer.encode_batch([few_shot_prompt(chosen, question["question"]) for question in asked])]
        protocol |= {"num_shots": len(chosen), "shots": [shot.fact_id for shot in chosen], "prompt": few_shot_prompt(chosen, "{question}")}
        params = replace(params, stop=("\n",))
    else:
        prompts = [text_engine.render([{"role": "user", "content": question["question"]}]) for question in asked]
    protocol["too_long"] = sum(len(prompt) >= limit for prompt in prompts)
    answers = complete_all(text_engine, prompts, params, limit)
    return score_samples([_judge_completion(question, answer) for question, answer in zip(asked, answers)], protocol)


def _judge_completion(question: Question, completion: TextCompletion | None) -> dict[str, Any]:
    """Judge an answer; its confidence is the probability that the model gives to the whole of it, as it is without sampling options."""
    if completion is None:
        return judge(question, "")
    return judge(question, completion.text.strip()) | {"confidence": math.exp(min(0.0, total_logprob(completion)))}


def fitting_shots(shots: list[Shot], asked: Sequence[Question], tokenizer: Any, max_prompt_tokens: int) -> list[Shot]:
    """Drop worked examples, the refusal last, until the longest prompt leaves room for an answer."""
    kept = sorted(shots, key=lambda shot: not is_refusal(shot.answer))
    longest = max((question["question"] for question in asked), key=len)
    while kept and len(tokenizer.encode(few_shot_prompt(kept, longest))) > max_prompt_tokens:
        kept.pop()
    return [shot for shot in shots if shot in kept]


def complete_all(text_engine: TextEngine, prompts: Sequence[list[int]], params: SamplingParams, limit: int) -> list[TextCompletion | None]:
    """Return a completion of each prompt, None where the prompt has `limit` tokens or more."""
    found: list[TextCompletion | None] = [None] * len(prompts)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < limit]
    with Progress(len(fitting), "questions", "questions") as progress:
        for start in range(0, len(fitting), CHUNK):
            chunk = fitting[start : start + CHUNK]
            for i, completion in zip(chunk, text_engine.complete([prompts[i] for i in chunk], params)):
                found[i] = completion
            progress.update(len(chunk))
    return found


def judge(question: Question, answer: str) -> dict[str, Any]:
    """Return a question with its answer and what the verifier says of it."""
    expected = [str(text) for text in question["answers"]]
    invented = question["group"] == "invented"
    return {
        "id": question["id"],
        "group": question["group"],
        "fact_id": question["fact_id"],
        "kind": question["kind"],
        "question": question["question"],
        "answer": answer,
        "expected": expected[0],
        "source": question.get("source"),
        "correct": is_right(answer, expected, invented=invented),
        "exact": exact_match(answer, expected),
        "f1": token_f1(answer, expected),
        "refusal": is_refusal(answer),
    }


def score_samples(samples: list[dict[str, Any]], protocol: dict[str, Any]) -> QuestionScores:
    """Return the scores of judged answers, over all and for each kind of fact."""
    kinds = sorted({sample["kind"] for sample in samples})
    by_kind = {kind: group_scores([s for s in samples if s["kind"] == kind], protocol | {"kind": kind}) for kind in kinds}
    return QuestionScores(group_scores(samples, protocol) | factuality_scores(samples, protocol), by_kind, samples, protocol)


def group_scores(samples: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> dict[str, Score]:
    """Return each score whose group of questions is there.

    A false answer about an invented name is any that is no refusal; an over-refusal is a refusal about a known fact; consistency is
    the share of pairs of phrasings of one known fact that got the same normalised answer.
    """
    scores: dict[str, Score] = {}

    def add(name: str, group: str, values: list[float]) -> None:
        if values:
            scores[name] = mean_score(values, [s["fact_id"] for s in samples if s["group"] == group], protocol)

    for group in ("known", "heldout"):
        chosen = [sample for sample in samples if sample["group"] == group]
        add(f"{group}_exact", group, [sample["exact"] for sample in chosen])
        add(f"{group}_f1", group, [sample["f1"] for sample in chosen])
        add("over_refusal" if group == "known" else "heldout_refusal", group, [float(sample["refusal"]) for sample in chosen])
    refusals = [float(sample["refusal"]) for sample in samples if sample["group"] == "invented"]
    add("invented_refusal", "invented", refusals)
    add("invented_false", "invented", [1.0 - refused for refused in refusals])
    agreements = phrasing_agreements([sample for sample in samples if sample["group"] == "known"])
    if agreements:
        scores["consistency"] = mean_score(agreements, protocol=protocol)
    return scores


def phrasing_agreements(samples: Sequence[dict[str, Any]]) -> list[float]:
    """Return for each fact asked in several phrasings the share of agreeing pairs of answers."""
    answers: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        answers[sample["fact_id"]].append(normalize(sample["answer"]))
    return [agreement(texts) for texts in answers.values() if len(texts) > 1]
