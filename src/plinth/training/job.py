"""A stage of training from its data to its published model: what all methods share around the one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plinth.config import UserError, from_dict, to_dict
from plinth.models.hub import TokenizerFiles, save_model
from plinth.run import Run, file_sha256
from plinth.training.checkpoint import Stateful
from plinth.training.loop import train
from plinth.training.optim import Scale
from plinth.training.spikes import DescribeBatch
from plinth.training.step import Batch, LossFunction


@dataclass(frozen=True)
class Job:
    """What one method gives to the loop: a model, a loss, and batches."""

    model: nn.Module
    """trained in place; what of it requires no gradient stays as it is"""
    loss: LossFunction
    """(model, batch) → sum, count, sums of metrics"""
    batches_at: Callable[[int], Sequence[Batch]]
    """the micro-batches of a step counted from 0; depends on nothing but the step"""
    steps: int
    """updates where the configuration names none"""
    tokenizer: TokenizerFiles | None
    """published with the model"""
    description: str
    """what the progress bar says"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """what identifies the data: a run resumed on other data is refused"""
    describe_batch: DescribeBatch | None = None
    """names the examples of a batch that looks wrong"""
    flops_per_token: float | None = None
    """operations of a training step a counted token, for MFU"""
    scales: dict[str, Scale] | None = None
    """factors on the rates by parameter"""
    lr_scale: Callable[[int], float] | None = None
    """factor on the rates at a step counted from 0 (default: the configuration's warm-up and decay)"""
    generators: Mapping[str, torch.Generator] | None = None
    """generators that the loss draws from: saved and restored"""
    extra_state: Mapping[str, Stateful] | None = None
    """other state that is saved and restored"""
    step_metrics: Callable[[int], dict[str, float]] = lambda steps: {}
    """further metrics of the update that makes so many, for its line of metrics.jsonl"""
    begin: Callable[[Run, Any], None] = lambda run, config: None
    """called with the run and the resolved configuration before the first step, for what is computed once and kept in the run"""
    publish: Callable[[Path], None] | None = None
    """writes the model folder (default: the model with its tokenizer)"""
    summarise: Callable[[dict[str, Any]], dict[str, Any]] = lambda summary: summary
    """the run's summary from the loop's"""


def reopen(out: Path, stage: str, parents: Sequence[Path], warn: Callable[[str], None]) -> Run:
    """Return the run to go on with; a finished one that was made of other files than these is told of.

    Raises UserError where there is no run, or one of another stage.
    """
    run = Run.open(out)
    made = run.provenance
    if made["stage"] != stage:
        raise UserError(f"{out} holds a run of stage {made['stage']}, not {stage}. Continue it with the verb that began it.")
    known = {parent["sha256"] for parent in made["parents"]}
    if run.is_done and (other := [str(path) for path in parents if path.is_file() and file_sha256(path) not in known]):
        warn(f"{out} is finished and was not made of {', '.join(other)}: nothing is trained. Pass --out with a new name for a new run.")
    return run


def run_job(
    out: Path,
    stage: str,
    config: Any,
    prepare: Callable[[Any], Job],
    *,
    parents: Sequence[Path] = (),
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train what `prepare` makes of the configuration and publish it as out/model; returns the finished run.

    `config` is a stage's frozen dataclass, whose field `train` is a TrainConfig.
    With `resume` the configuration saved in the run counts. Mistakes that `prepare` finds in the data leave no run behind.
    `parents` are what the run is made from, recorded with their hashes.
    """
    run = Run(out)
    if resume:
        run = reopen(out, stage, parents, warn)
        if run.is_done:
            return run
        config = from_dict(type(config), run.config, f"{out}/config.json: ")
    else:
        run.check_free()
    job = prepare(config)
    if not resume:
        config = replace(config, train=config.train.resolved(job.steps))
        run = Run.create(out, stage, to_dict(config), list(parents), argv, config.train.seed)
    job.begin(run, config)
    more: dict[str, Any] = {} if job.describe_batch is None else {"describe_batch": job.describe_batch}
    summary = train(
        run, job.model, job.loss, job.batches_at, config.train,
        description=job.description, data=job.data, flops_per_token=job.flops_per_token, scales=job.scales, lr_scale=job.lr_scale,
        generators=job.generators, extra_state=job.extra_state, data_metrics=job.step_metrics, resume=resume, warn=warn, **more,
    )  # fmt: skip
    if job.publish is None:
        save_model(job.model, job.tokenizer, run.model_dir)
    else:
        job.publish(run.model_dir)
    run.finish(job.summarise(summary))
    return run
