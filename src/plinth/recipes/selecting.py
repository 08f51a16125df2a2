"""From prompts to the best of several answers to each: data to learn from, and what the choice gained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plinth.config import UserError, save_json, to_dict
from plinth.evaluation.statistics import Z95, paired_difference
from plinth.inference.best_of import best_of_kl, best_of_mean
from plinth.inference.chat_model import ChatModel, KeptAnswers
from plinth.posttraining.feedback import JudgeConfig
from plinth.posttraining.principles import read_principles
from plinth.posttraining.prompts import read_prompts
from plinth.posttraining.selection import Drawn, SelectionConfig, draw_answers, open_score, selection_row
from plinth.recipes.feedback import KEPT_FILE, refuse_other, write_lines
from plinth.run import Progress, file_sha256


def select_answers(
    model: ChatModel,
    data: Path,
    out: Path,
    config: SelectionConfig,
    *,
    judge: ChatModel | None = None,
    judge_config: JudgeConfig | None = None,
    principles: Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Draw answers to the prompts of `data`, score them and write what is kept; return the report.

    out/sft.jsonl has the kept answers as conversations, out/answers.jsonl all whole ones with their scores, which is a ranking, and
    out/pairs.jsonl the best and the worst of each prompt. What models said is kept in out/asked.jsonl: called again after an
    interruption, this goes on from there. Raises UserError when nothing is kept, and where
    `out` holds what was made of another file.
    """
    known = [] if principles is None else read_principles(principles)
    refuse_other(out, "prompts", data)
    prompts = read_prompts(data)
    kept_judge = None if judge is None else KeptAnswers(judge, out / "judged.jsonl")
    score = open_score(config, prompts, kept_judge, judge_config or JudgeConfig(), known)
    with Progress(len(prompts), "drawing", "prompt") as progress:
        answers, cut_off = draw_answers(KeptAnswers(model, out / KEPT_FILE), prompts, config, progress.update)
    scores: Sequence[Sequence[float]] = [()] * len(prompts) if score is None else score(prompts, answers)
    drawn = [Drawn(prompt, tuple(texts), tuple(values)) for prompt, texts, values in zip(prompts, answers, scores)]
    chosen = [(each, place) for each in drawn for place in each.kept(config)]
    if cut_off:
        warn(f"{cut_off} of {config.n * len(prompts)} answers were cut off at max_tokens={config.max_tokens}: none of them is kept")
    if not chosen:
        raise UserError(f"no answer to {len(prompts)} prompts is kept: {_why(config, drawn)}.")
    origin = {"model": model.identity, "n": config.n, "by": config.by, "keep": config.keep, "seed": config.seed}
    write_lines(out / "sft.jsonl", (selection_row(each, place, origin) for each, place in chosen))
    several = [each for each in drawn if len(each.answers) > 1]
    write_lines(out / "answers.jsonl", (_all_answers(each) for each in several))
    pairs = [each for each in several if each.scores and each.scores[each.best()] > each.scores[each.worst()]]
    write_lines(out / "pairs.jsonl", (_pair(each, origin) for each in pairs))
    report = {
        "model": model.identity,
        "prompts": {"path": str(data), "sha256": file_sha256(data), "count": len(prompts)},
        "config": to_dict(config),
        "cut_off": cut_off,
        "sft_rows": len(chosen),
        "prompts_kept": len({id(each) for each, _ in chosen}),
        "pairs": len(pairs),
        **({} if score is None else gains(drawn, config.n)),
    }
    save_json(out / "report.json", report)
    return report


def gains(drawn: Sequence[Drawn], n: int) -> dict[str, Any]:
    """Return what choosing gives: the mean score of an answer and of the best, the difference with its interval, and a curve.

    The curve has, for 1 to n answers, the mean score of the best over all choices of so many, and the nats between it and the sampler
    (inference.best_of.best_of_kl, an upper bound where scores repeat). Prompts with an answer cut off count with those that are whole.
    """
    scored = [each.scores for each in drawn if each.scores]
    mean, best = ([float(take(values)) for values in scored] for take in (np.mean, max))
    whole = [values for values in scored if len(values) == n]
    counts = sorted({count for power in range(n.bit_length()) for count in (2**power, n) if count <= n})
    curve = [
        {"n": count, "score": float(np.mean([best_of_mean(values, count) for values in whole])), "kl_nats": best_of_kl(count)}
        for count in (counts if whole else [])
    ]
    spread = [Z95 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in (mean, best)]
    return {
        "mean_score": {"value": float(np.mean(mean)), "half_ci95": spread[0]},
        "best_score": {"value": float(np.mean(best)), "half_ci95": spread[1]},
        "gain": paired_difference(best, mean).to_dict(),
        "curve": curve,
    }


def _why(config: SelectionConfig, drawn: Sequence[Drawn]) -> str:
    if not any(each.answers for each in drawn):
        return f"all were cut off at max_tokens={config.max_tokens}; raise it"
    best = max(max(each.scores) for each in drawn if each.scores)
    return f"the best score is {best:g}, below threshold={config.threshold:g}; lower it, or draw more with n"


def _all_answers(drawn: Drawn) -> dict[str, Any]:
    scores = {"scores": list(drawn.scores)} if drawn.scores else {}
    return {"prompt": drawn.prompt.messages, "completions": list(drawn.answers), **scores}


def _pair(drawn: Drawn, origin: dict[str, Any]) -> dict[str, Any]:
    best, worst = drawn.best(), drawn.worst()
    scores = {"chosen_score": drawn.scores[best], "rejected_score": drawn.scores[worst]}
    return {
        "prompt": drawn.prompt.messages, "chosen": drawn.answers[best], "rejected": drawn.answers[worst], "selection": origin | scores,
    }  # fmt: skip
