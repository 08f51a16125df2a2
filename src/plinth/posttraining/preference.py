"""Preference tuning on pairs of a chosen and a rejected answer, by DPO or another loss of such pairs."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError, write_atomic
from plinth.data.buckets import LengthBuckets
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.ops.loss import token_log_probs
from plinth.posttraining.batches import describe_examples, pad_rows
from plinth.posttraining.preference_losses import REFERENCE_FREE, Pairs, check_options, preference_loss
from plinth.run import Run, file_sha256, find_model
from plinth.tokenizer.chat import Message, Rendered, check_messages, render
from plinth.tokenizer.encode import Tokenizer
from plinth.training.device import choose_device, move_batch
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.objectives import select_rows
from plinth.training.optim import OptimizerConfig
from plinth.training.precision import DTYPES
from plinth.training.step import InlineWorker, Workers, open_workers

REFERENCE_FILE = "reference_log_probs.npy"


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
    """tokens to process, padding included; given, it takes the place of epochs"""
    loss: str = "sigmoid"
    """loss of a pair: sigmoid (DPO), cdpo, robust, hinge, ipo, simpo, orpo, ...; all are in docs/losses.md"""
    beta: float | None = None
    """strength of the tie to the reference model; None takes the loss's own, 0.1 for most"""
    epsilon: float | None = None
    """share of labels taken to be the wrong way round, for the losses that read it; None takes the loss's own"""
    gamma: float | None = None
    """margin of simpo; None takes 1"""
    chosen_nll_coef: float | None = None
    """weight of the chosen answer's cross-entropy, which keeps its probability from sinking; None takes 0.2 with sigmoid, else 0"""
    pairs_per_step: int = 64
    """pairs an update"""
    micro_batch_size: int = 32
    """pairs a forward pass"""

    def __post_init__(self) -> None:
        if (self.beta is not None and self.beta <= 0) or self.epochs <= 0 or self.nll_coef < 0:
            raise UserError(
                f"beta={self.beta} and epochs={self.epochs} must be positive, chosen_nll_coef={self.chosen_nll_coef} 0 or more."
            )
        check_options(self.loss, self.loss_options)

    @property
    def loss_options(self) -> dict[str, float]:
        """What the loss is given beside the pairs."""
        given = {"beta": self.beta, "epsilon": self.epsilon, "gamma": self.gamma}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def nll_coef(self) -> float:
        """The weight of the chosen answer's cross-entropy, resolved."""
        if self.chosen_nll_coef is not None:
            return self.chosen_nll_coef
        return 0.2 if self.loss == "sigmoid" else 0.0


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer, rendered."""

    chosen: Rendered
    rejected: Rendered


def sequence_log_probs(model: Transformer, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability in nats of each row's counted targets, shape (B,)."""
    hidden_ND = model(inputs_BT).flatten(0, 1)
    targets_N = targets_BT.flatten()
    counted_N = targets_N >= 0
    rows = select_rows(counted_N, int(counted_N.sum()))
    log_probs = token_log_probs(hidden_ND[rows], model.output_weight, targets_N[rows], model.config.logit_softcap)
    return torch.zeros(inputs_BT.shape[0], device=inputs_BT.device).index_add(0, rows // inputs_BT.shape[1], log_probs)


def pairs_loss(policy: Transformer, batch: tuple[torch.Tensor, ...], config: DpoConfig) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Return (loss_sum, num_pairs, metrics) of (inputs, targets, reference log-probabilities (B, 2)), chosen rows before rejected ones.

    Beside the loss's own metrics: both answers' log-probabilities in nats and tokens and, with a reference, chosen_fell, the pairs whose
    chosen answer has become less likely than it was, all as sums over pairs.
    """
    inputs_BT, targets_BT, reference_B2 = batch
    chosen_B, rejected_B = sequence_log_probs(policy, inputs_BT, targets_BT).chunk(2)
    tokens_B, other_tokens_B = (targets_BT >= 0).sum(1).chunk(2)
    references = (None, None) if config.loss in REFERENCE_FREE else reference_B2.unbind(1)
    pairs = Pairs(chosen_B, rejected_B, references[0], references[1], tokens_B, other_tokens_B)
    total, count, metrics = preference_loss(config.loss, pairs, **config.loss_options)
    metrics["chosen_log_prob"], metrics["rejected_log_prob"] = float(chosen_B.sum().detach()), float(rejected_B.sum().detach())
    metrics["chosen_tokens"], metrics["rejected_tokens"] = float(tokens_B.sum()), float(other_tokens_B.sum())
    if references[0] is not None:
        metrics["chosen_fell"] = float((pairs.chosen_ratio_B.detach() < 0).sum())
    return total - config.nll_coef * chosen_B.sum(), count, metrics


def train_dpo(
    out: Path,
    model_run: Path,
    pairs_file: Path,
    config: DpoConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Tune a run's model on pairs ({"prompt", "chosen", "rejected"} a line) and publish it as out/model.

    The reference is the model as it comes in; its log-probabilities are computed once and kept in the run.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    pad_id = tokenizer.pad_id or 0

    def prepare(config: DpoConfig) -> Job:
        model = load_decoder(source)
        pairs, rejected = read_pairs(pairs_file, tokenizer, model.config.max_seq_len)
        if rejected:
            warn(f"{pairs_file}: {len(rejected)} lines rejected ({'; '.join(rejected[:3])})")
        lengths = [max(len(pair.chosen.tokens), len(pair.rejected.tokens)) for pair in pairs]
        buckets = LengthBuckets(lengths, config.pairs_per_step, config.micro_batch_size, config.train.seed)
        row_tokens = None if config.tokens is None else config.tokens // 2  # a pair is two rows
        reference = np.zeros((len(pairs), 2), dtype=np.float32)

        def begin(run: Run, config: DpoConfig) -> None:
            if config.loss not in REFERENCE_FREE:
                reference[:] = reference_log_probs(run, model, pairs, config, pad_id)

        def batches_at(step: int):
            return [(*pad_pairs(pairs, part, pad_id), torch.from_numpy(reference[part])) for part in buckets.indices(step)]

        def loss(policy: Transformer, batch):
            return pairs_loss(policy, batch, config)

        def describe_batch(step: int, rows: Sequence[int] | None) -> str:
            indices = np.concatenate(buckets.indices(step)).tolist()
            return describe_examples("pair", indices, rows, lambda i: tokenizer.decode(pairs[i].chosen.tokens[:40]))

        def summarise(summary: dict[str, Any]) -> dict[str, Any]:
            counts = {"pairs": len(pairs), "rejected_lines": len(rejected), "epochs": summary["steps"] / buckets.steps_per_epoch}
            return {name: value for name, value in summary.items() if name != "tokens"} | counts | {"pairs_seen": summary["tokens"]}

        return Job(
            model,
            loss,
            batches_at,
            steps=buckets.steps_for(config.epochs, row_tokens),
            tokenizer=tokenizer,
            description="preference tuning",
            data={"pairs_sha256": file_sha256(pairs_file), "tokenizer_sha256": tokenizer.sha256, "seed": config.train.seed},
            describe_batch=describe_batch,
            begin=begin,
            summarise=summarise,
        )

    return run_job(out, "dpo", config, prepare, parents=[model_run, pairs_file], resume=resume, argv=argv, warn=warn)


def pad_pairs(pairs: list[Pair], part: np.ndarray, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of the chosen rows, then the rejected rows."""
    rows = [pairs[i].chosen for i in part] + [pairs[i].rejected for i in part]
    return pad_rows([row.tokens for row in rows], [row.loss_mask for row in rows], pad_id)


def reference_log_probs(run: Run, model: Transformer, pairs: list[Pair], config: DpoConfig, pad_id: int) -> np.ndarray:
    """Return the incoming model's log-probabilities of chosen and rejected answers, shape (pairs, 2); computed once.

    They are computed in the dtype that the policy trains in, so that the first margin is zero.
    """
    path = run.path / REFERENCE_FILE
    if path.exists():
        return np.load(path)
    order = np.argsort([len(pair.chosen.tokens) for pair in pairs], kind="stable")
    parts = np.array_split(order, max(1, len(order) // config.micro_batch_size))
    device = choose_device(config.train.device)
    frozen = copy.deepcopy(model).to(device, DTYPES[config.train.dtype or "float32"])

    def score(part: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return sequence_log_probs(frozen, *move_batch(pad_pairs(pairs, part, pad_id), device)).view(2, -1).T.cpu().numpy()

    result = np.zeros((len(pairs), 2), dtype=np.float32)
    with open_workers(config.train.num_threads or 1, device) as workers:
        _fill(result, parts, workers, score)
    buffer = io.BytesIO()
    np.save(buffer, result)
    write_atomic(path, buffer.getvalue())
    return result


def _fill(result: np.ndarray, parts: list[np.ndarray], workers: Workers | InlineWorker, score: Callable[[np.ndarray], np.ndarray]) -> None:
    for part, scores in zip(parts, workers.map(score, parts)):
        result[part] = scores


def read_pairs(path: Path, tokenizer: Tokenizer, max_seq_len: int) -> tuple[list[Pair], list[str]]:
    """Read preference pairs from JSON Lines; return them rendered, and a reason for each line left out.

    A line is {"prompt": text or messages, "chosen": text, "rejected": text}.  Raises UserError when none is valid.
    """
    pairs, rejected = [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_parse_pair(line, tokenizer, max_seq_len))
        except UserError as error:
            rejected.append(f"line {number}: {error}")
    if not pairs:
        raise UserError(f"{path} holds no valid pair{': ' + rejected[0] if rejected else ''}. Each line needs prompt, chosen and rejected.")
    return pairs, rejected


def _parse_pair(line: str, tokenizer: Tokenizer, max_seq_len: int) -> Pair:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg}") from None
    missing = [key for key in ("prompt", "chosen", "rejected") if not isinstance(record, dict) or key not in record]
    if missing:
        raise UserError(f"no {missing[0]!r}")
    prompt = record["prompt"]
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    check_messages(messages)
    rendered = []
    for key in ("chosen", "rejected"):
        if not isinstance(record[key], str):
            raise UserError(f"{key!r} is not text")
        rendered.append(render(tokenizer, [*messages, {"role": "assistant", "content": record[key]}]))
        if len(rendered[-1].tokens) > max_seq_len + 1:
            raise UserError(f"{len(rendered[-1].tokens)} tokens exceed the context of {max_seq_len}")
    return Pair(*(_only_last_answer(r, len(render(tokenizer, messages).tokens)) for r in rendered))


def _only_last_answer(rendered: Rendered, prompt_tokens: int) -> Rendered:
    """Keep the loss on the answer after the prompt, not on earlier answers of the conversation."""
    mask = [flag and i >= prompt_tokens for i, flag in enumerate(rendered.loss_mask)]
    return Rendered(rendered.tokens, mask)
