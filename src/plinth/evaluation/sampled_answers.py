"""Many answers to each question with a verifiable one: what more of them would give, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from plinth.config import UserError
from plinth.evaluation.panels import Line, Panel, panels_svg
from plinth.evaluation.questions import (
    CHUNK,
    SPARE_TOKENS,
    Question,
    Shot,
    Style,
    choose_shots,
    few_shot_prompt,
    fitting_shots,
    judge,
    sample_questions,
)
from plinth.evaluation.sample_curve import Sampled, curve
from plinth.inference.best_of import cost_of, mean_logprob
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextCompletion, TextEngine
from plinth.models.cost import forward_flops_per_token
from plinth.run import Progress
from plinth.tasks.verify import normalize

WAYS = {"coverage": "a perfect verifier", "majority": "majority vote", "best_of": "highest mean log-probability"}


def answer_curve(
    text: TextEngine,
    questions: Sequence[Question],
    *,
    samples: int = 16,
    temperature: float = 1.0,
    style: Style = "chat",
    shots: Sequence[Shot] = (),
    max_questions: int | None = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw `samples` answers to each question about known facts and return the curve of quality against their number.

    Keys: rows, one a power of two up to `samples`, as sample_curve.curve gives them with scores as plain values; protocol.
    Raises UserError for fewer than two samples.
    """
    if samples < 2:
        raise UserError(f"samples={samples} gives no curve: draw at least 2.")
    asked = sample_questions([question for question in questions if question["group"] == "known"], max_questions, seed)
    if not asked:
        raise UserError("there is no question about a known fact among the questions.")
    tokenizer = text.tokenizer
    longest = max(len(ids) for ids in tokenizer.encode_batch([str(answer) for q in asked for answer in q["answers"]]))
    params = SamplingParams(temperature=temperature, max_tokens=longest + SPARE_TOKENS)
    prompts, stop = _prompts(text, asked, style, shots, seed, params.max_tokens)
    each = [SamplingParams(temperature=temperature, max_tokens=params.max_tokens, stop=stop, seed=seed + i) for i in range(samples)]
    drawn = [_sampled(text, question, found) for question, found in zip(asked, draw_answers(text, prompts, each))]
    sizes = [2**power for power in range(int(math.log2(samples)) + 1)]
    rows = curve(drawn, sizes, [question["fact_id"] for question in asked])
    protocol: dict[str, Any] = {"questions": len(asked), "samples": samples, "temperature": temperature, "style": style, "seed": seed}
    protocol |= {"max_tokens": params.max_tokens, "interval": "Wilson, clustered by fact"}
    return {"rows": [{key: _plain(value) for key, value in row.items()} for row in rows], "protocol": protocol}


def draw_answers(text: TextEngine, prompts: Sequence[list[int]], each: Sequence[SamplingParams]) -> Iterator[list[TextCompletion]]:
    """Yield for each prompt one completion by each of `each`; as many prompts are answered together as the engine likes."""
    per_call = max(1, CHUNK // len(each))
    with Progress(len(prompts), "questions", "questions") as progress:
        for start in range(0, len(prompts), per_call):
            part = prompts[start : start + per_call]
            completions = text.complete([prompt for prompt in part for _ in each], [one for _ in part for one in each])
            for place in range(len(part)):
                yield completions[place * len(each) : (place + 1) * len(each)]
            progress.update(len(part))


def _prompts(text: TextEngine, asked: Sequence[Question], style: Style, shots: Sequence[Shot], seed: int, max_tokens: int):
    if style == "chat":
        return [text.render([{"role": "user", "content": question["question"]}]) for question in asked], ()
    limit = text.engine.max_seq_len - 1 - max_tokens
    chosen = fitting_shots(choose_shots(shots, asked, seed), asked, text.tokenizer, limit)
    prefix = [] if text.tokenizer.start_id is None else [text.tokenizer.start_id]
    encoded = text.tokenizer.encode_batch([few_shot_prompt(chosen, question["question"]) for question in asked])
    return [prefix + ids for ids in encoded], ("\n",)


def _sampled(text: TextEngine, question: Question, completions: list[TextCompletion]) -> Sampled:
    answers = [normalize(completion.text) for completion in completions]
    verdicts: dict[str, bool] = {}
    for answer, completion in zip(answers, completions):
        verdicts.setdefault(answer, bool(judge(question, completion.text.strip())["correct"]))
    config, prompt = text.engine.runner.config, completions[0].prompt_tokens
    reading = 0 if config is None else prompt * forward_flops_per_token(config, prompt)
    return Sampled(
        right=[verdicts[answer] for answer in answers],
        answers=list(answers),
        scores=[mean_logprob(completion) for completion in completions],
        prompt_tokens=prompt,
        completion_tokens=[len(completion.tokens) for completion in completions],
        prompt_flops=reading,
        completion_flops=cost_of(completions, config).flops - reading,
    )


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def picture(result: dict[str, Any]) -> str:
    """Draw the curve; returns the text of an SVG file."""
    rows, sizes = result["rows"], [row["n"] for row in result["rows"]]
    lines = [Line(name, sizes, [row[key]["value"] for row in rows], colour) for (key, name), colour in zip(WAYS.items(), (6, 1, 4))]
    last = rows[-1]
    note = f"{last['n']} answers: {last['completion_tokens']:.0f} tokens written, {last['flops'] / 1e9:.2f} GFLOP a question"
    protocol = result["protocol"]
    title = f"Right answers against answers drawn, {protocol['questions']} questions, temperature {protocol['temperature']:g}"
    ticks = [(size, str(size)) for size in sizes]
    return panels_svg([Panel("known facts", note, lines)], title=title, x_label="answers drawn", y_label="share right", x_ticks=ticks)
