"""Log-probabilities of answers under a model, and those of the reference, which are computed once and kept in the run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch

from plinth.config import write_atomic
from plinth.data.buckets import like_lengths
from plinth.models.transformer import Transformer
from plinth.ops.loss import token_log_probs
from plinth.ops.shared_rows import SharedRows
from plinth.run import Run
from plinth.training.device import choose_device, move_batch
from plinth.training.loop import TrainConfig
from plinth.training.objectives import select_rows
from plinth.training.precision import DTYPES
from plinth.training.step import InlineWorker, Workers, open_workers

REFERENCE_FILE = "reference_log_probs.npy"


def sequence_log_probs(model: Transformer, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability in nats of each row's counted targets, shape (B,)."""
    owners_BT = torch.arange(len(inputs_BT), device=inputs_BT.device)[:, None].expand_as(inputs_BT)
    return _summed(model, model(inputs_BT), targets_BT, owners_BT, len(inputs_BT))


def shared_log_probs(model: Transformer, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, rows: SharedRows) -> torch.Tensor:
    """Return the summed log-probability in nats of each sequence's counted targets, shape (B, R).

    It is what `sequence_log_probs` gives for the R sequences of each row alone.
    """
    B, R, _ = rows.places_BRT.shape
    return _summed(model, model(inputs_BL, shared=rows), targets_BL, rows.owners_BL, B * R).view(B, R)


def counted_tokens(targets_BL: torch.Tensor, rows: SharedRows) -> torch.Tensor:
    """Return the counted targets of each sequence, shape (B, R)."""
    B, R, _ = rows.places_BRT.shape
    counts = torch.zeros(B * R, dtype=torch.long, device=targets_BL.device)
    return counts.index_add(0, rows.owners_BL.flatten(), (targets_BL >= 0).flatten().long()).view(B, R)


def _summed(model: Transformer, hidden: torch.Tensor, targets: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    targets_N, owners_N = targets.flatten(), owners.flatten()
    counted_N = targets_N >= 0
    rows = select_rows(counted_N, int(counted_N.sum()))
    log_probs = token_log_probs(hidden.flatten(0, 1)[rows], model.output_weight, targets_N[rows], model.config.logit_softcap)
    return torch.zeros(count, device=hidden.device).index_add(0, owners_N[rows], log_probs)


Score = Callable[[Transformer, tuple[torch.Tensor, ...]], torch.Tensor]
"""(model, batch) -> log-probabilities in nats, (examples, sides)."""


def reference_log_probs(
    run: Run,
    load: Callable[[], Transformer],
    score: Score,
    batch_of: Callable[[np.ndarray], tuple[torch.Tensor, ...]],
    lengths: Sequence[int],
    micro_batch_size: int,
    config: TrainConfig,
) -> np.ndarray:
    """Return the reference's log-probabilities of every example's sides, fp32 (examples, sides); computed once a run.

    `load` gives the reference, the model as it comes in. It computes in the dtype that the policy trains in, so that the first margin
    is zero.
    """
    path = run.path / REFERENCE_FILE
    if path.exists():
        return np.load(path)
    device = choose_device(config.device)
    reference = load().to(device, DTYPES[config.dtype or "float32"])
    with open_workers(config.num_threads or 1, device) as workers:
        result = score_examples(reference, score, batch_of, lengths, micro_batch_size, workers)
    buffer = io.BytesIO()
    np.save(buffer, result)
    write_atomic(path, buffer.getvalue())
    return result


def score_examples(
    model: Transformer,
    score: Score,
    batch_of: Callable[[np.ndarray], tuple[torch.Tensor, ...]],
    lengths: Sequence[int],
    micro_batch_size: int,
    workers: Workers | InlineWorker,
) -> np.ndarray:
    """Return a model's log-probabilities of the sides of as many examples as there are lengths, fp32 (examples, sides)."""
    parts = like_lengths(lengths, micro_batch_size)[::-1]  # the longest first, so that threads end together
    device = model.embed.weight.device

    def scores(part: np.ndarray) -> np.ndarray:
        with torch.no_grad():  # which each thread has for itself
            return score(model, move_batch(batch_of(part), device)).float().cpu().numpy()

    found = workers.map(scores, parts)
    result = np.empty((len(lengths), found[0].shape[1]), dtype=np.float32)
    for part, values in zip(parts, found):
        result[part] = values
    return result
