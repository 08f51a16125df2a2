"""A reward model from pairs or rankings, and what it is worth on held-out ones: beside the length, the words and a coin."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from plinth.config import UserError, read_json, save_json
from plinth.data.rejects import row_counts
from plinth.evaluation.comparisons import Baselines, Pair, compare_judges
from plinth.posttraining.adapted_models import load_adapted_reward
from plinth.posttraining.formats import read_examples
from plinth.posttraining.masks import scored_tokens
from plinth.posttraining.reward import LoadedReward, load_reward
from plinth.posttraining.reward_data import Choice, TooLong, read_choices
from plinth.posttraining.reward_tuning import RewardTuning, train_reward
from plinth.run import Run

BASELINES = "reward_baselines.json"
REPORT = "reward.json"


def make_reward_model(
    out: Path,
    model_run: Path,
    data: Path,
    config: RewardTuning,
    *,
    held_out: Path | None = None,
    references: Path | None = None,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train a reward model (see `train_reward`) and report on the held-out pairs, in the run's summary and in evals/reward.json.

    The baselines learn from the training pairs; they are kept in evals/ too, for reports on other files.
    """

    def report(reward: LoadedReward, training: Sequence[Choice], unseen: Sequence[Choice]) -> dict[str, Any]:
        baselines = Baselines.fit([pair for pair, _, _ in pairs_of(training)])
        found = report_choices(reward, unseen, baselines)
        evals = Run(out).evals_dir
        evals.mkdir(exist_ok=True)
        save_json(evals / BASELINES, baselines.to_dict())
        save_json(evals / REPORT, found)
        return {"held_out": found}

    return train_reward(
        out, model_run, data, config, held_out=held_out, references=references, report=report, resume=resume, argv=argv, warn=warn
    )


def pairs_of(choices: Sequence[Choice]) -> list[tuple[Pair, int, int]]:
    """Return all pairs of unequal rank as (pair, number of the better answer, of the worse), answers numbered through all choices.

    Where a label says that the chosen answer is less likely to be the better one, the two change places.
    """
    pairs, first = [], 0
    for choice in choices:
        texts = choice.answer_texts()
        for i, rank in enumerate(choice.ranks):
            for k, other in enumerate(choice.ranks):
                if rank < other:
                    a, b = (i, k) if choice.probability >= 0.5 else (k, i)
                    pairs.append((Pair(texts[a], texts[b], choice.prompt_key), first + a, first + b))
        first += len(choice.rows)
    return pairs


def report_choices(reward: LoadedReward, choices: Sequence[Choice], baselines: Baselines | None) -> dict[str, Any]:
    """Return what `compare_judges` says of a reward model on choices. Raises UserError when no answer is better than another."""
    pairs = pairs_of(choices)
    if not pairs:
        raise UserError("all answers held out have the same rank, so there is nothing to judge.")
    scores = reward.score_tokens(list(chain.from_iterable(choice.rows for choice in choices))).double().numpy()
    better, worse = (np.array([entry[side] for entry in pairs]) for side in (1, 2))
    spread = {"mean": float(scores.mean()), "std": float(scores.std())}
    return compare_judges((scores[better] - scores[worse]).tolist(), [pair for pair, _, _ in pairs], baselines) | {"scores": spread}


def score_file(
    run: Path,
    data: Path,
    *,
    adapter: Path | None = None,
    out: Path | None = None,
    too_long: TooLong = "leave_out",
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Score the answers of a file; on pairs and rankings return what `report_choices` does, on conversations the mean and deviation.

    With `adapter`, `run` is the model that it belongs to. With `out` a line of JSON for each answer is written there: its row in the
    file, its rank where there is one, its score.
    """
    reward = load_reward(run) if adapter is None else load_adapted_reward(run, adapter)
    if read_examples(data).kind not in ("preference", "ranking"):
        return _score_conversations(reward, data, out)
    limit = reward.model.config.max_seq_len
    found = read_choices(data, reward.tokenizer, limit, too_long)
    if left := found.describe_left(limit):
        warn(f"{data}: {left}")
    kept = Path(adapter or run) / "evals" / BASELINES
    baselines = Baselines.from_dict(read_json(kept)) if kept.is_file() else None
    if baselines is None:
        warn(f"{adapter or run} has no baselines from its training, so the report compares with a coin alone.")
    scores = reward.score_tokens([row for choice in found.choices for row in choice.rows]).tolist() if out else []
    places = [(choice.number, rank) for choice in found.choices for rank in choice.ranks]
    _write(out, [{"row": number, "rank": rank, "score": score} for (number, rank), score in zip(places, scores)])
    return report_choices(reward, found.choices, baselines) | found.counts()


def _score_conversations(reward: LoadedReward, data: Path, out: Path | None) -> dict[str, Any]:
    examples = read_examples(data, "messages")
    rows = [scored_tokens(reward.tokenizer, row) for row in examples.rows]
    scores = reward.score_tokens(rows)
    _write(out, [{"row": number, "score": score} for number, score in zip(examples.numbers, scores.tolist())])
    return {
        "conversations": len(rows),
        **row_counts(len(examples.rejected)),
        "scores": {"mean": float(scores.double().mean()), "std": float(scores.double().std(correction=0))},
    }


def _write(out: Path | None, records: Sequence[dict[str, Any]]) -> None:
    if out is not None:
        out.write_text("".join(json.dumps(record) + "\n" for record in records))
