"""Log-probabilities of answers under a model, and those of the reference, which are computed once and kept in the run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch

from plinth.config import write_atomic
from plinth.models.transformer import Transformer
from plinth.ops.loss import token_log_probs
from plinth.run import Run
from plinth.training.device import choose_device, move_batch
from plinth.training.loop import TrainConfig
from plinth.training.objectives import select_rows
from plinth.training.precision import DTYPES
from plinth.training.step import open_workers

REFERENCE_FILE = "reference_log_probs.npy"


def sequence_log_probs(model: Transformer, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability in nats of each row's counted targets, shape (B,)."""
    hidden_ND = model(inputs_BT).flatten(0, 1)
    targets_N = targets_BT.flatten()
    counted_N = targets_N >= 0
    rows = select_rows(counted_N, int(counted_N.sum()))
    log_probs = token_log_probs(hidden_ND[rows], model.output_weight, targets_N[rows], model.config.logit_softcap)
    return torch.zeros(inputs_BT.shape[0], device=inputs_BT.device).index_add(0, rows // inputs_BT.shape[1], log_probs)


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
    order = np.argsort(lengths, kind="stable")
    parts = np.array_split(order, max(1, len(order) // micro_batch_size))
    device = choose_device(config.device)
    reference = load().to(device, DTYPES[config.dtype or "float32"])

    def scores(part: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return score(reference, move_batch(batch_of(part), device)).float().cpu().numpy()

    with open_workers(config.num_threads or 1, device) as workers:
        found = workers.map(scores, parts)
    result = np.empty((len(order), found[0].shape[1]), dtype=np.float32)
    for part, values in zip(parts, found):
        result[part] = values
    buffer = io.BytesIO()
    np.save(buffer, result)
    write_atomic(path, buffer.getvalue())
    return result
