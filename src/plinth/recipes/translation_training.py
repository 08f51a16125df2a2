"""Training on parallel files: what encoder-decoders and recurrent models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from plinth.data.parallel import Pair
from plinth.recipes.translation_data import Tokenizers, TranslationData, find_tokenizers, keep_tokenizers, read_parallel
from plinth.run import Run
from plinth.training.job import Job, run_job
from plinth.training.step import LossFunction


def train_on_pairs(
    out: Path,
    files: Sequence[Path],
    config: Any,
    *,
    stage: str,
    fit: Callable[[Any, Tokenizers], Any],
    job: Callable[[Any, TranslationData, Sequence[Pair]], Job],
    tokenizers: Sequence[Path],
    held_out: Sequence[Path],
    resume: bool,
    argv: list[str] | None,
    warn: Callable[[str], None],
) -> Run:
    """Train a model on parallel files (source, target, ...) and publish it as out/model; returns the finished run.

    `config` has the fields model, train and data; `fit` gives the model's shape for the tokenizers, `job` what the loop needs.
    `tokenizers` are folders, one for both sides or one each; without, they are trained on the files and kept in the run. `held_out` are
    a source and a target file on which the summary has the loss. With `resume` the configuration saved in the run counts.
    """
    if not resume:
        Run(out).check_free()
    pairs, empty = read_parallel(files, config.data)
    held_pairs = read_parallel(held_out, config.data)[0] if held_out else []
    found = find_tokenizers(Path(out), pairs, config.data, tokenizers, resume)
    config = replace(config, model=fit(config, found))
    if empty:
        warn(f"{empty} pairs have an empty side and are left out.")

    def prepare(config: Any) -> Job:
        data = TranslationData.open(files, pairs, empty, found, config.data, config.train.seed)
        if data.text.num_too_long:
            warn(f"{data.text.num_too_long} pairs have more than {config.data.max_seq_len} tokens on a side and are left out.")
        return job(config, data, held_pairs)

    parents = [*files, *tokenizers, *held_out]
    return run_job(Path(out), stage, config, prepare, parents=parents, resume=resume, argv=argv, warn=warn)


def pairs_job(
    model: nn.Module,
    loss: LossFunction,
    data: TranslationData,
    held_pairs: Sequence[Pair],
    epochs: float,
    *,
    heldout_loss: LossFunction,
    flops_per_token: float,
) -> Job:
    """Return what the loop needs to train a model on parallel text; `heldout_loss` is what the summary has of held-out pairs."""

    def summarise(summary: dict[str, Any]) -> dict[str, Any]:
        found = data.counts(summary["steps"]) | {"num_params": sum(p.numel() for p in model.parameters())}
        return summary | found | (data.heldout(model, heldout_loss, held_pairs) if held_pairs else {})

    return Job(
        model,
        loss,
        data.batches.at,
        steps=data.batches.steps_for(epochs),
        tokenizer=data.tokenizers.source,
        description="pretraining",
        data=data.fingerprint(),
        describe_batch=data.describe,
        flops_per_token=flops_per_token,
        begin=lambda run, config: keep_tokenizers(run, data.tokenizers, config.data),
        publish=lambda folder: data.tokenizers.publish(model, folder),
        summarise=summarise,
    )


def mean_lengths(data: TranslationData) -> tuple[float, float]:
    """Return the mean tokens of a source and of a target."""
    return float(data.text.sources.lengths.mean()), float(data.text.targets.lengths.mean())
