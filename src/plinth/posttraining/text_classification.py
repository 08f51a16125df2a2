"""A language model learns labels of texts, as ULMFiT has it: pooled states, rates that fall with depth, layers unfrozen from the top.

Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets
from plinth.data.features import Row, causal_rows, pad_rows
from plinth.data.labelled import label_names, read_examples
from plinth.data.rejects import row_counts
from plinth.models.hub import load_model, save_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.text_classifier import TextClassifier, TextClassifierConfig
from plinth.models.transformer import Transformer
from plinth.ops.dropout import seeded, step_seeds
from plinth.posttraining.batches import describe_examples
from plinth.posttraining.depth_rates import Unfreezing, depth_scales
from plinth.posttraining.transfer_config import TransferClassifyConfig
from plinth.run import Run, file_sha256, find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.training.job import Job, run_job
from plinth.training.objectives_encoder import num_right

SETTLED = 4096  # examples, at most, whose statistics batch norm keeps


def classification_loss(model: TextClassifier, batch: tuple[torch.Tensor, ...]):
    """Return the cross-entropy of a label a text.

    The batch is tokens (B, T), lengths (B,), labels (B,), seeds of dropout (B,), and the number of frozen groups (B,).
    """
    tokens_BT, lengths_B, labels_B, seeds_B, frozen_B = batch
    scores = model(tokens_BT, lengths_B, seeded(seeds_B), int(frozen_B[0]))
    return F.cross_entropy(scores.float(), labels_B, reduction="sum"), len(labels_B), {"accuracy": num_right(scores, labels_B)}


def train_classifier(
    out: Path,
    model_run: Path,
    data: Path,
    config: TransferClassifyConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Finetune a run's language model to tell labels of texts and publish the classifier as out/model; returns the finished run.

    The labels are those that the examples have. Rejected lines are counted in the summary and told through `warn`.
    Raises UserError for a model that is neither a decoder nor an AWD-LSTM, and for fewer than two labels.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    examples, rejects = read_examples(data, "classify", labelled=True)
    if rejects.count:
        warn(f"{data}: {rejects.describe()}")
    labels = label_names(examples, "classify")

    def prepare(config: TransferClassifyConfig) -> Job:
        model = classifier_on(load_model(source), config, labels, str(model_run))
        numbers = {label: i for i, label in enumerate(labels)}
        rows = causal_rows(examples, tokenizer, numbers, model.config.longest, config.truncate, config.head.backwards)
        buckets = LengthBuckets([len(row.tokens) for row in rows], config.examples_per_step, config.micro_batch_size, config.train.seed)
        steps = config.train.steps or buckets.steps_for(config.epochs, None)
        groups = model.depth_groups()
        every = max(1, round(config.unfreeze_epochs * buckets.steps_per_epoch))
        unfreezing = Unfreezing.plan(config.unfreeze, len(groups), steps, every)

        def batches_at(step: int):
            chosen = [[rows[i] for i in part] for part in buckets.indices(step)]
            return [batch_of(part, tokenizer, config, unfreezing, step, number) for number, part in enumerate(chosen)]

        return Job(
            model,
            classification_loss,
            batches_at,
            steps=steps,
            tokenizer=tokenizer,
            description="finetuning",
            data={"examples_sha256": file_sha256(data), "tokenizer_sha256": tokenizer.sha256, "seed": config.train.seed},
            scales=depth_scales(groups, config.rates.depth_factor, unfreezing),
            lr_scale=(lambda step: unfreezing.slanted_scale(step, config.rates)) if config.rates.slanted else None,
            step_metrics=lambda steps: {"learning_groups": len(groups) - unfreezing.frozen_at(steps - 1)},
            describe_batch=lambda step, chosen: describe_examples(
                "example", np.concatenate(buckets.indices(step)).tolist(), chosen, lambda i: tokenizer.decode(rows[i].tokens[:40])
            ),
            publish=lambda folder: save_model(settled(model, rows, tokenizer), tokenizer, folder),
            summarise=lambda summary: (
                summary
                | {"labels": list(labels), "examples": len(examples), "groups": len(groups)}
                | row_counts(rejects.count, cut=sum(row.is_cut for row in rows))
                | {"epochs": summary["steps"] / buckets.steps_per_epoch, "unfrozen_at_steps": list(unfreezing.starts)}
            ),
        )

    return run_job(out, "classify", config, prepare, parents=[model_run, data], resume=resume, argv=argv, warn=warn)


def classifier_on(model: nn.Module, config: TransferClassifyConfig, labels: tuple[str, ...], where: str) -> TextClassifier:
    """Return a classifier whose trunk is the language model (with `fresh`, one of its shape) and whose head is new.

    Raises UserError when `model` is no language model, or there are fewer than two labels.
    """
    if not isinstance(model, AwdLstm | Transformer):
        raise UserError(
            f"{where} holds neither a decoder nor an AWD-LSTM. Name a run of `plinth pretrain` or `plinth transfer finetune-lm`."
        )
    if len(labels) < 2:
        raise UserError(f"the examples have the label {', '.join(labels)} alone. There must be two to tell apart.")
    trunk = model.config
    if isinstance(trunk, AwdLstmConfig):  # what would be dropped before the vocabulary's head is dropped from the pooled text
        trunk = replace(trunk.without_dropout(config.trunk_dropout), output_dropout=0.0)
    classifier = TextClassifier(TextClassifierConfig(trunk, labels, config.head))
    classifier.init_weights(torch.Generator().manual_seed(config.train.seed))
    if not config.fresh:
        classifier.load_trunk(model)
    return classifier


def batch_of(
    rows: Sequence[Row], tokenizer: Tokenizer, config: TransferClassifyConfig, unfreezing: Unfreezing, step: int, part: int
) -> tuple[torch.Tensor, ...]:
    """Return a micro-batch as `classification_loss` takes it."""
    tokens, lengths = padded(rows, tokenizer)
    seeds = step_seeds(config.train.seed, step, part, len(rows))
    return tokens, lengths, torch.tensor([row.label for row in rows]), seeds, torch.full((len(rows),), unfreezing.frozen_at(step))


def padded(rows: Sequence[Row], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (B, T), padded on the right, and the rows' lengths (B,)."""
    longest = max(len(row.tokens) for row in rows)
    return pad_rows(rows, tokenizer.pad_id or 0, longest)[0], torch.tensor([len(row.tokens) for row in rows])


def settled(model: TextClassifier, rows: Sequence[Row], tokenizer: Tokenizer) -> TextClassifier:
    """Return the model, its batch norm keeping the statistics of the training examples, or an even choice of SETTLED of them."""
    chosen = sorted(rows[:: -(-len(rows) // SETTLED)], key=lambda row: len(row.tokens))
    model.settle([padded(chosen[i : i + 32], tokenizer) for i in range(0, len(chosen), 32)])
    return model
