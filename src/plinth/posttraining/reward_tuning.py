"""Training of a reward model on answers in order of preference: Bradley-Terry on every pair of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets
from plinth.models.reward import RewardModel
from plinth.ops.shared_rows import SharedRows
from plinth.posttraining.adapter_files import frozen_identity, publish_model, with_adapters
from plinth.posttraining.adapter_training import adapted_job
from plinth.posttraining.batches import describe_examples
from plinth.posttraining.formats import read_examples
from plinth.posttraining.masks import scored_tokens
from plinth.posttraining.reward import LoadedReward, start_model
from plinth.posttraining.reward_config import RewardTuning
from plinth.posttraining.reward_data import Batch, Choice, Choices, batch_of, read_choices, repeated_prompts, split_tail
from plinth.posttraining.reward_losses import ranking_loss
from plinth.run import Run, file_sha256, find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.training.job import Job, run_job

REFERENCES = 512  # answers that normalisation looks at where no file names others


def reward_loss(model: RewardModel, batch: Batch, center_coef: float = 0.0) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Return (Σ over prompts of the mean loss of their pairs, prompts with a pair, metrics) of a batch as `reward_data.batch_of` makes it.

    Every answer goes through the model once, whatever the number of its pairs, and what a prompt's answers begin with once for all of them.
    Metrics, summed over prompts: accuracy, margin, mean_score.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; for a pair that is Bradley-Terry's likelihood.
    """
    tokens_PL, places, homes, shared, lengths_PG, ranks_PG, margin_P, probability_P = batch
    scores_PG = model.forward_shared(tokens_PL, SharedRows(places, homes, shared), lengths_PG)
    return ranking_loss(scores_PG, ranks_PG, margin_P=margin_P, probability_P=probability_P, center_coef=center_coef)


def normalise(model: RewardModel, tokenizer: Tokenizer, references: Sequence[Sequence[int]], *, unit: bool) -> tuple[float, float]:
    """Shift the model's scores of the reference answers to mean 0, with `unit` to deviation 1 too; return mean and deviation before.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.1 (mean 0 and deviation 1); Ouyang et al. 2022, appendix C.2 (mean 0).
    """
    scores = LoadedReward(model, tokenizer).score_tokens(references).double()
    mean, deviation = float(scores.mean()), float(scores.std(correction=0))
    gain = 1 / deviation if unit and deviation > 0 else 1.0
    model.rescale(gain, -mean * gain)
    return mean, deviation


def reference_rows(tokenizer: Tokenizer, choices: Sequence[Choice], path: Path | None, limit: int) -> list[list[int]]:
    """Return the answers that normalisation looks at: a file's conversations, else the best answers of the first choices.

    Raises UserError for a conversation that is longer than `limit` tokens.
    """
    if path is None:
        return [choice.rows[choice.ranks.index(min(choice.ranks))] for choice in choices[:REFERENCES]]
    rows = [scored_tokens(tokenizer, row) for row in read_examples(path, "messages").rows]
    if (longest := max(map(len, rows))) > limit:
        raise UserError(f"{path} has a conversation of {longest} tokens, more than max_seq_len={limit}. Shorten it.")
    return rows


Report = Callable[[LoadedReward, Sequence[Choice], Sequence[Choice]], dict[str, Any]]
"""(model, training choices, held-out choices) → what the run's summary says of the held-out ones"""


def train_reward(
    out: Path,
    model_run: Path,
    data: Path,
    config: RewardTuning,
    *,
    held_out: Path | None = None,
    references: Path | None = None,
    report: Report | None = None,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train a reward model on a run's decoder, or go on with a reward model, and publish it as out/model.

    With adapters these and the head are published as out/adapter, in PEFT's format, and out/model has them merged.

    `data` holds pairs or rankings in any format of formats.FORMATS. Held out is the file `held_out`, else the tail of `data`; `report`
    is asked about it. Rows left out, cut or rejected are counted in the run's summary and told through `warn`.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)

    def prepare(config: RewardTuning) -> Job:
        model = with_adapters(start_model(source, config.train.seed), config.adapter, config.train.seed)
        places = None if model.config.decoder.position == "rope" else model.config.max_seq_len
        limit = config.max_seq_len or model.config.max_seq_len
        limit = limit if places is None else min(limit, places - 1)  # where places are learnt, one is kept for padding
        found = read_choices(data, tokenizer, limit, config.too_long)
        training, tail = split_tail(found.choices, 0.0 if held_out else config.held_out_share)
        other = read_choices(held_out, tokenizer, limit, config.too_long) if held_out else Choices(tail, found.examples)
        tell(warn, data, found, limit)
        if held_out:
            tell(warn, held_out, other, limit)
        if repeated := repeated_prompts(training, other.choices):
            warn(f"{repeated} of {len(other.choices)} held-out prompts are trained on too, with other answers or the same.")
        buckets = LengthBuckets(
            [choice.longest for choice in training], config.prompts_per_step, config.micro_batch_size, config.train.seed
        )
        rows = reference_rows(tokenizer, training, references, limit)

        def begin(run: Run, config: RewardTuning) -> None:
            if config.normalise_before:
                normalise(model, tokenizer, rows, unit=True)

        def publish(folder: Path) -> None:
            if config.normalise != "none":
                normalise(model, tokenizer, rows, unit=config.normalise == "mean_std")
            publish_model(model, tokenizer, folder, str(source))

        def summarise(summary: dict[str, Any]) -> dict[str, Any]:
            counts = {"prompts": len(training), "held_out_prompts": len(other.choices), "repeated_prompts": repeated, **found.counts()}
            told = report(LoadedReward(model, tokenizer), training, other.choices) if report and other.choices else {}
            rest = {name: value for name, value in summary.items() if name != "tokens"}
            return rest | counts | {"epochs": summary["steps"] / buckets.steps_per_epoch, "prompts_seen": summary["tokens"]} | told

        def loss(model: Any, batch: Batch):
            return reward_loss(model, batch, config.center_coef)

        job = Job(
            model,
            loss,
            lambda step: [batch_of([training[i] for i in part], tokenizer.pad_id or 0, places) for part in buckets.indices(step)],
            steps=buckets.steps_for(config.epochs, None),
            tokenizer=tokenizer,
            description="reward model",
            data={
                "data_sha256": file_sha256(data),
                "tokenizer_sha256": tokenizer.sha256,
                "seed": config.train.seed,
                **frozen_identity(config.adapter, source),
            },
            describe_batch=lambda step, chosen: describe_examples(
                "row", np.concatenate(buckets.indices(step)).tolist(), chosen, lambda i: tokenizer.decode(training[i].rows[0][:40])
            ),
            begin=begin,
            publish=publish,
            summarise=summarise,
        )
        return adapted_job(job, config.adapter, config.train)

    parents = [model_run, data, *(file for file in (held_out, references) if file is not None)]
    return run_job(out, "reward", config, prepare, parents=parents, resume=resume, argv=argv, warn=warn)


def tell(warn: Callable[[str], None], path: Path, found: Choices, limit: int) -> None:
    """Say what was recognised in a file, and what was left out or cut of it."""
    left = found.describe_left(limit)
    if found.examples.rejected or left:
        warn(f"{path}: {found.examples.describe()}" + (f"; {left}" if left else ""))
