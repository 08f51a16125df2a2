"""Preference tuning: on pairs of a chosen and a rejected answer (DPO and its kin), or on labelled single answers (KTO and its kin)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.posttraining.adapter_files import count_trained, frozen_identity, publish_model, with_adapters
from plinth.posttraining.batches import describe_examples
from plinth.posttraining.displacement import displacement, last_means, length_bias
from plinth.posttraining.examples import SHOWN, Examples
from plinth.posttraining.formats import read_examples
from plinth.posttraining.log_probs import counted_tokens, reference_log_probs, sequence_log_probs, shared_log_probs
from plinth.posttraining.lora import LoraConfig
from plinth.posttraining.pairs import (
    SHARED_PARTS,
    LeftOut,
    Pair,
    SharedBatch,
    pad_sides,
    render_pairs,
    row_tokens,
    share_sides,
    shared_rows_of,
)
from plinth.posttraining.preference_losses import PREFERENCE_LOSSES, REFERENCE_FREE, Pairs, check_options, preference_loss
from plinth.posttraining.unpaired import LabelledAnswer, reference_point, render_labelled, unpaired_loss, weight_advice
from plinth.posttraining.unpaired_losses import UNPAIRED_LOSSES
from plinth.run import Run, file_sha256, find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.training.device import choose_device, move_batch
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from plinth.training.step import Batch, InlineWorker, Workers


@dataclass(frozen=True)
class DpoConfig:
    """Loss, batches and schedule of preference tuning."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=5, keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(lr=3e-5, muon_lr=2e-4)
        )
    )
    """optimizer and schedule; not compiled on a GPU, as its batches have many shapes"""
    epochs: float = 1.0
    """passes over the pairs"""
    tokens: int | None = None
    """tokens to learn from, each answer's with its prompt's; given, it takes the place of epochs"""
    loss: str = "sigmoid"
    """loss of a pair: sigmoid (DPO), cdpo, robust, hinge, ipo, simpo, orpo, ...; of a labelled answer: kto, apo_zero_unpaired, bco"""
    beta: float | None = None
    """strength of the tie to the reference model; None takes the loss's own, 0.1 for most"""
    epsilon: float | None = None
    """share of labels taken to be the wrong way round, for the losses that read it; None takes the loss's own, with cdpo each pair's own
    where the file has probabilities"""
    gamma: float | None = None
    """margin of simpo; None takes 1"""
    desirable_weight: float | None = None
    """weight of wanted answers in kto; None takes 1"""
    undesirable_weight: float | None = None
    """weight of unwanted answers in kto; None takes 1"""
    chosen_nll_coef: float | None = None
    """weight of the chosen answer's cross-entropy, which keeps its probability from sinking; None takes 0.2 with sigmoid, else 0"""
    pairs_per_step: int = 64
    """pairs, or labelled answers, an update"""
    micro_batch_size: int = 32
    """pairs, or labelled answers, a forward pass"""
    max_seq_len: int | None = None
    """longest prompt with its answer in tokens (default: the model's context); longer ones are left out, counted, never cut"""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """train adapters in place of the weights; the reference is the model without them"""

    def __post_init__(self) -> None:
        if (self.beta is not None and self.beta <= 0) or self.epochs <= 0 or self.nll_coef < 0:
            raise UserError(
                f"beta={self.beta} and epochs={self.epochs} must be positive, chosen_nll_coef={self.chosen_nll_coef} 0 or more."
            )
        if self.is_unpaired and self.chosen_nll_coef is not None:
            raise UserError(f"chosen_nll_coef={self.chosen_nll_coef} is for losses of pairs, and {self.loss} is none. Leave it out.")
        check_options(self.loss, self.loss_options, PREFERENCE_LOSSES | UNPAIRED_LOSSES)

    @property
    def is_unpaired(self) -> bool:
        """Whether the loss is of single answers."""
        return self.loss in UNPAIRED_LOSSES

    @property
    def loss_options(self) -> dict[str, float]:
        """What the loss is given beside the answers."""
        names = ("beta", "epsilon", "gamma", "desirable_weight", "undesirable_weight")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def nll_coef(self) -> float:
        """The weight of the chosen answer's cross-entropy, resolved."""
        if self.chosen_nll_coef is not None:
            return self.chosen_nll_coef
        return 0.2 if self.loss == "sigmoid" else 0.0


def sides_log_probs(model: Transformer, inputs_BRT: torch.Tensor, targets_BRT: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability in nats of the counted targets of each example's sequences, shape (B, R)."""
    return sequence_log_probs(model, inputs_BRT.flatten(0, 1), targets_BRT.flatten(0, 1)).view(inputs_BRT.shape[:2])


def pairs_log_probs(model: Transformer, batch: SharedBatch) -> torch.Tensor:
    """Return the summed log-probability in nats of each pair's two answers, shape (B, 2); their prompt is computed once."""
    return shared_log_probs(model, batch[0], batch[1], shared_rows_of(batch))


def pairs_loss(policy: Transformer, batch: tuple[torch.Tensor, ...], config: DpoConfig) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Return (loss_sum, num_pairs, metrics) of a SharedBatch and reference log-probabilities (B, 2), chosen before rejected.

    One tensor more (B,) holds each pair's own epsilon.

    Beside the loss's own metrics: both answers' log-probabilities in nats and tokens and, with a reference, their log-ratios to it and
    chosen_fell, the pairs whose chosen answer has become less likely than it was, all as sums over pairs.
    """
    shared, (reference_B2, *epsilon) = batch[:SHARED_PARTS], batch[SHARED_PARTS:]
    chosen_B, rejected_B = pairs_log_probs(policy, shared).unbind(1)
    tokens_B, other_tokens_B = counted_tokens(shared[1], shared_rows_of(shared)).unbind(1)
    references = (None, None) if config.loss in REFERENCE_FREE else reference_B2.unbind(1)
    pairs = Pairs(chosen_B, rejected_B, references[0], references[1], tokens_B, other_tokens_B)
    options = config.loss_options | ({"epsilon": epsilon[0]} if epsilon else {})
    total, count, metrics = preference_loss(config.loss, pairs, **options)
    metrics["chosen_log_prob"], metrics["rejected_log_prob"] = float(chosen_B.sum().detach()), float(rejected_B.sum().detach())
    metrics["chosen_tokens"], metrics["rejected_tokens"] = float(tokens_B.sum()), float(other_tokens_B.sum())
    if references[0] is not None:
        ratios = pairs.chosen_ratio_B.detach(), pairs.rejected_ratio_B.detach()
        metrics["chosen_ratio"], metrics["rejected_ratio"] = (float(ratio_B.sum()) for ratio_B in ratios)
        metrics["chosen_fell"] = float((ratios[0] < 0).sum())
    return total - config.nll_coef * chosen_B.sum(), count, metrics


class PairedRows:
    """Pairs as batches of a loss of pairs."""

    def __init__(self, pairs: Sequence[Pair], config: DpoConfig, pad_id: int):
        self.pairs, self.config, self.pad_id = pairs, config, pad_id
        self.lengths = [row_tokens((pair.chosen, pair.rejected)) + 1 for pair in pairs]
        self.total_tokens = sum(len(pair.chosen.tokens) + len(pair.rejected.tokens) for pair in pairs)
        self.needs_reference = config.loss not in REFERENCE_FREE
        self.sides = 2
        self.soft = sum(pair.probability is not None for pair in pairs)
        self.epsilon = torch.tensor([0.0 if pair.probability is None else 1 - pair.probability for pair in pairs])
        self.reads_epsilon = config.loss == "cdpo" and config.epsilon is None and self.soft > 0

    def open(self, num_threads: int) -> None:
        """Do nothing: pairs need no threads of their own."""

    def close(self) -> None:
        """Do nothing."""

    def reference_batch(self, part: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return the sequences whose log-probabilities under the reference the loss reads."""
        return share_sides([(self.pairs[i].chosen, self.pairs[i].rejected) for i in part], self.pad_id)

    def score(self, model: Transformer, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the log-probabilities of a reference batch, (B, sides)."""
        return pairs_log_probs(model, batch)

    def batches(self, parts: Sequence[np.ndarray], reference: np.ndarray, policy: Transformer) -> list[Batch]:
        """Return a step's micro-batches."""
        own = [(self.epsilon[torch.from_numpy(part)],) if self.reads_epsilon else () for part in parts]
        return [(*self.reference_batch(part), torch.from_numpy(reference[part]), *more) for part, more in zip(parts, own)]

    def loss(self, policy: Transformer, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
        return pairs_loss(policy, batch, self.config)

    def tokens(self, i: int) -> list[int]:
        """Return the tokens that name a pair in a message."""
        return self.pairs[i].chosen.tokens

    def counts(self) -> dict[str, int]:
        """Return what the summary says of the data."""
        return {"pairs": len(self.pairs)}


class LabelledRows:
    """Labelled answers as batches of a loss of single answers."""

    def __init__(self, answers: Sequence[LabelledAnswer], config: DpoConfig, pad_id: int):
        self.answers, self.config, self.pad_id = answers, config, pad_id
        self.lengths = [len(row.answer.tokens) for row in answers]
        self.total_tokens = sum(self.lengths)
        self.wanted = np.array([row.wanted for row in answers])
        self.needs_reference = True
        self.sides = 2 if config.loss == "kto" else 1
        self.device = choose_device(config.train.device)
        self._workers: Workers | InlineWorker = InlineWorker()

    def open(self, num_threads: int) -> None:
        """Let so many threads of a CPU measure the reference point."""
        self._workers = Workers(num_threads) if self.device == "cpu" else InlineWorker()

    def close(self) -> None:
        """End the threads."""
        if isinstance(self._workers, Workers):
            self._workers.close()

    def reference_batch(self, part: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return the sequences whose log-probabilities under the reference the loss reads: the answers, and kto's mismatched ones."""
        rows = [self.answers[i] for i in part]
        return pad_sides([[row.answer] if row.mismatched is None else [row.answer, row.mismatched] for row in rows], self.pad_id)

    def score(self, model: Transformer, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the log-probabilities of a reference batch, (B, sides)."""
        return sides_log_probs(model, *batch)

    def batches(self, parts: Sequence[np.ndarray], reference: np.ndarray, policy: Transformer) -> list[Batch]:
        """Return a step's micro-batches, with the step's reference point under the policy as it is."""
        answers = [pad_sides(([self.answers[i].answer] for i in part), self.pad_id) for part in parts]
        wanted = [torch.from_numpy(self.wanted[part]) for part in parts]
        references = [torch.from_numpy(reference[part]) for part in parts]
        point = self._point(parts, answers, wanted, references, policy)
        return [
            (*batch, labels, values[:, 0], torch.full((len(labels),), point)) for batch, labels, values in zip(answers, wanted, references)
        ]

    def _point(self, parts, answers, wanted, references, policy: Transformer) -> float:
        if self.config.loss == "apo_zero_unpaired":
            return 0.0
        measured = answers
        if self.config.loss == "kto":
            measured = [pad_sides(([self.answers[i].mismatched] for i in part), self.pad_id) for part in parts]

        def score(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
            with torch.no_grad():  # which each thread has for itself
                return sides_log_probs(policy, *move_batch(batch, self.device))[:, 0].float().cpu()

        found = self._workers.map(score, measured)
        side = 1 if self.config.loss == "kto" else 0
        return reference_point(self.config.loss, found, [values[:, side] for values in references], wanted, self.config.beta or 0.1)

    def loss(self, policy: Transformer, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
        return unpaired_loss(policy, batch, self.config.loss, self.config.loss_options)

    def tokens(self, i: int) -> list[int]:
        """Return the tokens that name an answer in a message."""
        return self.answers[i].answer.tokens

    def counts(self) -> dict[str, int]:
        """Return what the summary says of the data."""
        return {"answers": len(self.answers), "wanted": int(self.wanted.sum())}


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
    log-probabilities are computed once and kept in the run. With adapters these are published as out/adapter, in PEFT's format, and
    out/model has them merged. What is read and left out is told through `warn`, with row numbers, and at the end if the chosen answers
    have become less likely.
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
        trained_params = count_trained(model)
        rows, left_out = load_rows(tokenizer, found, config, model.config.max_seq_len, data, warn)
        buckets = LengthBuckets(rows.lengths, config.pairs_per_step, config.micro_batch_size, config.train.seed)
        epochs = config.epochs if config.tokens is None else config.tokens / rows.total_tokens
        reference = np.zeros((len(rows.lengths), rows.sides), dtype=np.float32)

        def begin(run: Run, config: DpoConfig) -> None:
            rows.open(config.train.num_threads or 1)
            if rows.needs_reference:
                reference[:] = reference_log_probs(
                    run, lambda: fresh(config), rows.score, rows.reference_batch,
                    rows.lengths, config.micro_batch_size, config.train,
                )  # fmt: skip

        def describe_batch(step: int, chosen: Sequence[int] | None) -> str:
            indices = np.concatenate(buckets.indices(step)).tolist()
            return describe_examples("pair", indices, chosen, lambda i: tokenizer.decode(rows.tokens(i)[:40]))

        def summarise(summary: dict[str, Any]) -> dict[str, Any]:
            counts = rows.counts() | {"rejected_lines": len(found.rejected), "left_out": len(left_out)}
            kept = {name: value for name, value in summary.items() if name != "tokens"}
            rows.close()
            means = last_means(Run(out).metrics())
            if said := displacement(means, config.nll_coef):
                warn(said)
            adapted = {} if config.adapter.rank is None else {"trained_params": trained_params}
            epochs = {"epochs": summary["steps"] / buckets.steps_per_epoch, "pairs_seen": summary["tokens"]}
            return kept | counts | epochs | means | adapted

        return Job(
            model,
            rows.loss,
            lambda step: rows.batches(buckets.indices(step), reference, model),
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
            summarise=summarise,
        )

    return run_job(out, "dpo", config, prepare, parents=[model_run, data], resume=resume, argv=argv, warn=warn)


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


def load_rows(
    tokenizer: Tokenizer, found: Examples, config: DpoConfig, context: int, data: Path, warn: Callable[[str], None]
) -> tuple[PairedRows | LabelledRows, LeftOut]:
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
    shown = "; ".join(f"row {number}: {reason}" for number, reason in left_out[:SHOWN])
    if not rows.lengths:
        raise UserError(f"{data} holds no {found.kind} row that can be learnt: {shown}.")
    if left_out:
        more = f"; and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        warn(f"{data}: {len(left_out)} left out, {len(rows.lengths)} used ({shown}{more})")
    return rows, left_out
