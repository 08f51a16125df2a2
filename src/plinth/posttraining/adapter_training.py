"""What adapters change about a stage's training: dropout, and rates of their matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from plinth.config import UserError
from plinth.ops.dropout import dropping, seeded, step_seeds
from plinth.posttraining.adapter_files import count_trained
from plinth.posttraining.lora import LoraConfig
from plinth.training.job import Job
from plinth.training.loop import TrainConfig
from plinth.training.optim import Scale
from plinth.training.step import Batch, LossFunction


def adapted_job(job: Job, adapter: LoraConfig, train: TrainConfig) -> Job:
    """Return the job with what the adapters' options ask of it: rates of their matrices, and losses within which what enters A is dropped.

    Its summary says how many numbers are trained, as `trained_params`, where it does not say so itself.

    Dropout wants batches that are tuples of tensors with a row each, and gets one part more: the seed of the micro-batch. What is
    dropped depends on nothing but the seed of the run, the step and the place of the micro-batch in it.
    Raises UserError for dropout in a compiled model or a recorded graph, which would drop the same numbers for ever.
    """
    if adapter.rank is None:
        return job
    trained = count_trained(job.model)
    job = replace(job, summarise=lambda summary, of=job.summarise: {"trained_params": trained} | of(summary))
    scales = {**(job.scales or {}), **scales_of(job.model, adapter)}
    if not adapter.dropout:
        return replace(job, scales=scales)
    for name in ("compile", "cuda_graphs"):
        if getattr(train, name):
            raise UserError(f"adapter.dropout={adapter.dropout} draws anew for every batch, and train.{name}=true would not. Give one.")
    return replace(job, scales=scales, loss=dropped(job.loss), batches_at=lambda step: seed_batches(job.batches_at(step), train.seed, step))


def scales_of(model: nn.Module, adapter: LoraConfig) -> dict[str, Scale]:
    """Return the factors on rate and weight decay of the adapters' matrices: LoRA+'s for B, and no decay of what PiSSA took from W.

    Source: Hayou et al. 2024, arXiv:2402.12354, section 4: eta_B = ratio eta_A.
    """
    decay = 0.0 if adapter.init == "pissa" else 1.0
    kinds = {"lora_a": Scale(weight_decay=decay), "lora_b": Scale(lr=adapter.lr_ratio, weight_decay=decay)}
    names = ((name, name.rpartition(".")[2]) for name, _ in model.named_parameters())
    return {name: kinds[kind] for name, kind in names if kind in kinds}


def seed_batches(batches: Sequence[tuple[torch.Tensor, ...]], seed: int, step: int) -> list[tuple[torch.Tensor, ...]]:
    """Return a step's micro-batches with one part more each: its seed, once a row."""
    return [(*batch, step_seeds(seed, step, part, len(batch[0]))) for part, batch in enumerate(batches)]


def dropped(loss: LossFunction) -> LossFunction:
    """Return the loss of a batch whose last part is its seed, computed with dropout on what enters the adapters."""

    def with_dropout(model: nn.Module, batch: Batch) -> Any:
        *parts, seeds_B = batch
        with dropping(seeded(seeds_B)):
            return loss(model, tuple(parts))

    return with_dropout
