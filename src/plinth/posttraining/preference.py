"""Preference tuning: on pairs of a chosen and a rejected answer (DPO and its kin), or on labelled single answers (KTO and its kin)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets, like_lengths
from plinth.data.rejects import row_counts
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.posttraining.adapter_files import frozen_identity, publish_model, with_adapters
from plinth.posttraining.adapter_training import adapted_job
from plinth.posttraining.batches import describe_examples
from plinth.posttraining.displacement import displacement, last_means, length_bias
from plinth.posttraining.examples import SHOWN, Examples
from plinth.posttraining.formats import read_examples
from plinth.posttraining.held_out import HeldOut, last_held_out
from plinth.posttraining.log_probs import reference_log_probs
from plinth.posttraining.moving_reference import MovingReference
from plinth.posttraining.pairs import LeftRow, render_pairs
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.preference_rows import LabelledRows, PairedRows
from plinth.posttraining.unpaired import render_labelled, weight_advice
from plinth.run import Run, file_sha256, find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.training.job import Job, run_job
from plinth.training.step import Batch


def train_dpo(
    out: Path,
    model_run: Path,
    data: Path,
    config: DpoConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Tune a run's model on preferences, in any format of formats.FORMATS, and publish it as out/model.

    Rankings become pairs, and pairs two labelled answers for a loss of single answers. The reference is the model as it comes in; its
    log-probabilities are computed once and kept in the run, unless it moves (MovingReference). With adapters these are published as
    out/adapter, in PEFT's format, and out/model has them merged. What is read and left out is told through `warn`, with row numbers, and
    at the end if the chosen answers have become less likely.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    found = read_preferences(data, config)
    if found.rejected or set(found.detected) != {found.kind}:
        warn(f"{data}: {found.describe()}")

    def fresh(config: DpoConfig) -> Transformer:
        return with_adapters(load_decoder(source), config.adapter, config.train.seed)  # fresh adapters change nothing

    def prepare(config: DpoConfig) -> Job:
        model = fresh(config)
        rows, left_out = load_rows(tokenizer, found, config, model.config.max_seq_len, data, warn)
        buckets = LengthBuckets(rows.lengths, config.pairs_per_step, config.micro_batch_size, config.train.seed)
        epochs = config.epochs if config.tokens is None else config.tokens / rows.total_tokens
        held = None if config.held_out is None else read_held_out(tokenizer, config, model.config.max_seq_len, warn)
        everything = rows if held is None else rows.joined(held)
        reference = np.zeros((len(everything.lengths), everything.sides), dtype=np.float32)
        own, others = reference[: len(rows.lengths)], reference[len(rows.lengths) :]
        held_out = None if held is None else measured(held, others, model, config)
        moving = None if config.move_reference_every is None else MovingReference(model, lambda: fresh(config), everything, reference)

        def begin(run: Run, config: DpoConfig) -> None:
            rows.open(config.train.num_threads or 1)
            if held_out is not None:
                held_out.begin(config.train)
            if moving is not None:
                moving.begin(config, lambda step: np.concatenate(buckets.indices(step)), np.arange(len(own), len(reference)))
            elif rows.needs_reference:
                reference[:] = reference_log_probs(
                    run, lambda: fresh(config), everything.score, everything.reference_batch,
                    everything.lengths, config.micro_batch_size, config.train,
                )  # fmt: skip

        def batches_at(step: int) -> list[Batch]:
            if moving is not None:
                moving.at(step)
            return rows.batches(buckets.indices(step), own, model, step)

        def step_metrics(steps: int) -> dict[str, float]:
            return ({} if held_out is None else held_out(steps)) | ({} if moving is None else {"reference_moves": moving.number})

        def describe_batch(step: int, chosen: Sequence[int] | None) -> str:
            indices = np.concatenate(buckets.indices(step)).tolist()
            return describe_examples("pair", indices, chosen, lambda i: tokenizer.decode(rows.tokens(i)[:40]))

        def summarise(summary: dict[str, Any]) -> dict[str, Any]:
            too_long = sum(row.is_too_long for row in left_out)
            counts = rows.counts() | row_counts(len(found.rejected), too_long=too_long, unusable=len(left_out) - too_long)
            kept = {name: value for name, value in summary.items() if name != "tokens"}
            rows.close()
            if moving is not None:
                moving.close()
            means = last_means(Run(out).metrics())
            if said := displacement(means, config.nll_coef):
                warn(said)
            epochs = {"epochs": summary["steps"] / buckets.steps_per_epoch, "pairs_seen": summary["tokens"]}
            return kept | counts | epochs | means | last_held_out(Run(out).metrics())

        job = Job(
            model,
            rows.loss,
            batches_at,
            steps=buckets.steps_for(epochs, None),
            tokenizer=tokenizer,
            description="preference tuning",
            publish=lambda folder: publish_model(model, tokenizer, folder, str(source)),
            data={
                "pairs_sha256": file_sha256(data),
                "tokenizer_sha256": tokenizer.sha256,
                "seed": config.train.seed,
                **frozen_identity(config.adapter, source),
            },
            describe_batch=describe_batch,
            begin=begin,
            step_metrics=step_metrics,
            extra_state={} if moving is None else {"reference": moving},
            summarise=summarise,
        )
        return adapted_job(job, config.adapter, config.train)

    return run_job(
        out,
        "dpo",
        config,
        prepare,
        parents=[model_run, data, *([config.held_out] if config.held_out else [])],
        resume=resume,
        argv=argv,
        warn=warn,
    )


def read_preferences(data: Path, config: DpoConfig) -> Examples:
    """Read what the loss learns from. Raises UserError, with the way out, for labelled answers under a loss of pairs."""
    if config.is_unpaired:
        return read_examples(data, "unpaired")
    try:
        return read_examples(data, "preference")
    except UserError:
        if _holds_labels(data):
            raise UserError(
                f"{data} holds labelled single answers, which loss={config.loss} does not learn from. "
                "Use --loss kto, bco or apo_zero_unpaired."
            ) from None
        raise


def _holds_labels(data: Path) -> bool:
    with contextlib.suppress(UserError):
        return read_examples(data).kind == "unpaired"
    return False


def read_held_out(tokenizer: Tokenizer, config: DpoConfig, context: int, warn: Callable[[str], None]) -> PairedRows | LabelledRows:
    """Return the rows of config.held_out; what cannot be read is told."""
    assert config.held_out is not None
    found = read_preferences(config.held_out, config)
    if found.rejected:
        warn(f"{config.held_out}: {found.describe()}")
    return load_rows(tokenizer, found, config, context, config.held_out, warn)[0]


def measured(rows: PairedRows | LabelledRows, reference: np.ndarray, model: Transformer, config: DpoConfig) -> HeldOut:
    """Return what measures held-out rows by the loss that trains; `reference` holds their log-probabilities once training begins."""
    parts = like_lengths(rows.lengths, config.micro_batch_size)
    return HeldOut(model, rows.loss, lambda: rows.batches(parts, reference, model), config.held_out_every)


def load_rows(
    tokenizer: Tokenizer, found: Examples, config: DpoConfig, context: int, data: Path, warn: Callable[[str], None]
) -> tuple[PairedRows | LabelledRows, list[LeftRow]]:
    """Render what was read, say what is left out, and return the rows. Raises UserError when none is left."""
    limit, pad_id = min(config.max_seq_len or context, context), tokenizer.pad_id or 0
    if config.is_unpaired:
        answers, left_out = render_labelled(tokenizer, found, limit, mismatch=config.loss == "kto", seed=config.train.seed)
        rows: PairedRows | LabelledRows = LabelledRows(answers, config, pad_id)
        wanted = sum(row.wanted for row in answers)
        if advice := weight_advice(wanted, len(answers) - wanted, config.loss, config.loss_options):
            warn(f"{data}: {advice}")
    else:
        pairs, left_out = render_pairs(tokenizer, found, limit)
        rows = PairedRows(pairs, config, pad_id)
        if said := length_bias([sum(pair.chosen.loss_mask) for pair in pairs], [sum(pair.rejected.loss_mask) for pair in pairs]):
            warn(f"{data}: {said}")
        if rows.soft and not rows.reads_epsilon:
            warn(f"{data}: the probabilities of {rows.soft} pairs are not read; --loss cdpo without --epsilon learns from them.")
    shown = "; ".join(f"row {row.number}: {row.reason}" for row in left_out[:SHOWN])
    if not rows.lengths:
        raise UserError(f"{data} holds no {found.kind} row that can be learnt: {shown}.")
    if left_out:
        more = f"; and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        warn(f"{data}: {len(left_out)} left out, {len(rows.lengths)} used ({shown}{more})")
    return rows, left_out
