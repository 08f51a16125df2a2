"""From a model and its training questions to data that fit what it knows: asked by sampling, judged, written."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from plinth.config import UserError, save_json, to_dict, write_atomic
from plinth.data.rejects import row_counts
from plinth.evaluation.questions import NUM_SHOTS, SPARE_TOKENS, Shot, Style, few_shot_prompt
from plinth.evaluation.run import model_style
from plinth.evaluation.sampled_answers import draw_answers
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextEngine
from plinth.inference.verifiers import check_name, verify
from plinth.posttraining.examples import Conversation, Prompt, Row
from plinth.posttraining.formats import read_examples, read_records
from plinth.run import file_sha256, find_model, publish_dir, tree_sha256
from plinth.tasks.knowledge import Asked, Judged, KnowledgeConfig, factuality_pairs, judge_knowledge, refusal_aware_lines
from plinth.tasks.verify import is_refusal, normalize

FILES = ("answers.jsonl", "sft.jsonl", "pairs.jsonl")


def make_knowledge_data(
    model: Path,
    data: Path,
    out: Path,
    config: KnowledgeConfig,
    text: TextEngine | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Ask a model its training questions and write the folder `out`; returns its manifest.

    `data` holds conversations or verifiable questions in any format of formats.FORMATS; of a conversation the question is all before the
    last answer. `text` is the model's engine where there is one already. `out` gets answers.jsonl (each question with its
    samples and its split), sft.jsonl (refusal-aware) and pairs.jsonl (preferences), each for the verb that reads it, and manifest.json.
    `warn` is told of rows that are left out.
    Raises UserError when the data hold no question that can be asked, or the model knows the answer to none.
    """
    if out.exists():
        raise UserError(f"{out} exists. Name a new folder.")
    check_name(config.verifier)
    folder = find_model(model)
    questions, refusals, left = read_questions(data, config, warn)
    text = text or TextEngine.load(folder, max_batch=64)
    style = model_style(folder, text.tokenizer)
    asked, too_long = ask(text, questions, config, style)
    judged = judge_knowledge(asked, config, verify)
    lines, left_sft = refusal_aware_lines(judged, refusals, config)
    pairs, left_pairs = factuality_pairs(judged, config)
    answers = [_answer_line(each) for each in judged]
    manifest = {
        "model": str(folder),
        "model_sha256": tree_sha256(folder),
        "data": str(data),
        "data_sha256": file_sha256(data),
        "config": to_dict(config),
        "style": style,
        "questions": len(asked),
        "refused_in_the_data": len(refusals),
        **row_counts(**left, too_long=too_long),
        "facts": dict(Counter({each.asked.fact_id: each.split for each in judged}.values())),
        "right_share": sum(each.share for each in judged) / len(judged),
        "sft_lines": dict(Counter(row["kind"] for row in lines)),
        "pairs": dict(Counter(row["kind"] for row in pairs)),
        "refusals_over_the_bound": {"sft": left_sft, "pairs": left_pairs},
    }
    with publish_dir(out) as temporary:
        for name, rows in zip(FILES, (answers, lines, pairs)):
            write_atomic(temporary / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        save_json(temporary / "manifest.json", manifest)
    return manifest


def read_questions(data: Path, config: KnowledgeConfig, warn: Callable[[str], None]) -> tuple[list[Asked], list[Asked], dict[str, int]]:
    """Return the questions to ask, those whose target is a refusal, and how many rows were rejected, or ask nothing or hold calls.

    A row's field `fact_id` says what it is about; without one, equal answers to equal questions are one fact.
    """
    found = read_examples(data)
    if found.kind != "verifiable":
        found = read_examples(data, "messages")
    if found.rejected:
        warn(f"{data}: {found.describe()}")
    records = dict(read_records(data))
    questions, refusals, unusable = [], [], 0
    for number, row in zip(found.numbers, found.rows):
        asked = _asked(row)
        if asked is None:
            unusable += 1
            continue
        fact = records[number].get("fact_id") or f"{normalize(str(asked.prompt[-1].get('content')))} -> {normalize(asked.target)}"
        asked = replace(asked, fact_id=str(fact))
        (refusals if is_refusal(asked.target) and not asked.is_checked_only else questions).append(asked)
    if not questions:
        raise UserError(f"{data} holds no question with an answer that is no refusal.")
    return sample_facts(questions, config), refusals, {"rejected": len(found.rejected), "unusable": unusable}


def _asked(row: Row) -> Asked | None:
    """Return the question of a row, not answered yet; None where there is none that a text would answer."""
    if isinstance(row, Prompt):
        return Asked(row.messages, row.answer or "", "", (), row.verifier, is_checked_only=True)
    assert isinstance(row, Conversation)
    *prompt, last = row.messages
    answer = str(last.get("content") or "")
    if not prompt or last["role"] != "assistant" or last.get("tool_calls") or not answer.strip():
        return None
    return Asked(prompt, answer, "", ())


def sample_facts(questions: list[Asked], config: KnowledgeConfig) -> list[Asked]:
    """Return at most config.max_questions questions, all of whole facts, in their order; the first fact drawn is always whole."""
    if config.max_questions is None or len(questions) <= config.max_questions:
        return questions
    counts = Counter(question.fact_id for question in questions)
    order = sorted(counts)
    random.Random(f"knowledge questions {config.seed}").shuffle(order)
    taken, room = set(), config.max_questions
    for fact in order:
        if taken and counts[fact] > room:
            break
        taken.add(fact)
        room -= counts[fact]
    return [question for question in questions if question.fact_id in taken]


def ask(text: TextEngine, questions: list[Asked], config: KnowledgeConfig, style: Style = "chat") -> tuple[list[Asked], int]:
    """Return the questions with config.samples answers each, and how many had no room in the context.

    An answer may be a little longer than the longest target. Sample i of every question has the seed config.seed + i. A model that was
    only pretrained is asked in plain text behind worked examples of other facts (few_shot), as many of NUM_SHOTS as all have room for.
    Raises UserError when none fits.
    """
    longest = max(len(ids) for ids in text.tokenizer.encode_batch([question.target for question in questions]))
    stop = () if style == "chat" else ("\n",)
    seeds = range(config.seed, config.seed + config.samples)
    params = [SamplingParams(config.temperature, max_tokens=longest + SPARE_TOKENS, stop=stop, seed=seed) for seed in seeds]
    if style == "chat":
        prompts = [text.render(question.prompt) for question in questions]
    else:
        limit = text.engine.max_seq_len - longest - SPARE_TOKENS
        tries = (_few_shot(text, questions, config, number) for number in range(NUM_SHOTS, 0, -1))
        prompts = next((found for found in tries if max(map(len, found)) < limit), _few_shot(text, questions, config, 0))
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < text.engine.max_seq_len]
    if not fitting:
        raise UserError(f"none of {len(questions)} questions fits the context of {text.engine.max_seq_len} tokens.")
    drawn = draw_answers(text, [prompts[i] for i in fitting], params)
    asked = [replace(questions[i], texts=tuple(each.text.strip() for each in found)) for i, found in zip(fitting, drawn)]
    return asked, len(questions) - len(fitting)


def _few_shot(text: TextEngine, questions: list[Asked], config: KnowledgeConfig, number: int) -> list[list[int]]:
    """Return prompts in plain text: each question behind `number` others with their answers, none of them about its fact."""
    order = list(questions)
    random.Random(f"knowledge shots {config.seed}").shuffle(order)
    prompts = []
    for question in questions:
        others = itertools.islice((each for each in order if each.fact_id != question.fact_id), number)
        shots = [Shot(each.fact_id, str(each.prompt[-1]["content"]), each.target) for each in others]
        prompts.append(few_shot_prompt(shots, str(question.prompt[-1]["content"])))
    prefix = [] if text.tokenizer.start_id is None else [text.tokenizer.start_id]
    return [prefix + ids for ids in text.tokenizer.encode_batch(prompts)]


def _answer_line(judged: Judged) -> dict[str, Any]:
    asked = judged.asked
    return {
        "prompt": asked.prompt,
        "target": asked.target,
        "taken_for_right": judged.answer,
        "fact_id": asked.fact_id,
        "samples": list(asked.texts),
        "right_share": judged.share,
        "split": judged.split,
    }
