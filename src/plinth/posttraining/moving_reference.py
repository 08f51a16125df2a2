"""A reference that follows the policy: every so many updates it becomes the policy, or moves a part of the way to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from plinth.models.transformer import Transformer
from plinth.posttraining.log_probs import score_examples
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.preference_rows import LabelledRows, PairedRows
from plinth.training.step import InlineWorker, Workers, start_workers


class MovingReference:
    """π_ref ← α π + (1 − α) π_ref in the weights, before every update whose number `config.move_reference_every` divides.

    At a move the reference's log-probabilities are computed of what the updates up to the next one read, and of held-out rows. They are
    part of a checkpoint, so that a resumed run goes on bit for bit. With α = 1 the reference is the policy as it is at the move, and has
    no weights of its own; below, a second model is in memory, and in every checkpoint.
    Source: Gorbatovski et al. 2024 (TR-DPO), arXiv:2404.09656: the hard update is α = 1, the soft one α below.
    """

    def __init__(self, policy: Transformer, load: Callable[[], Transformer], rows: PairedRows | LabelledRows, values: np.ndarray):
        """`load` gives a model like the policy, `rows` are all that is read, `values` (rows, sides) is where their log-probabilities go."""
        self.policy, self.load, self.rows, self.values = policy, load, rows, values
        self.number = -1  # of the stretch between two moves
        self._weights: dict[str, torch.Tensor] = {}
        self._model: Transformer | None = None
        self._workers: Workers | InlineWorker = InlineWorker()

    def begin(self, config: DpoConfig, read_at: Callable[[int], np.ndarray], held_out: np.ndarray) -> None:
        """Make ready for the first update; `read_at` tells the rows of an update counted from 0, `held_out` those read at any time."""
        assert config.move_reference_every is not None
        self.config, self.read_at, self.held_out = config, read_at, held_out
        self.every, self.share = config.move_reference_every, config.move_reference_by or 1.0
        self._workers = start_workers(config.train.num_threads or 1, self.policy.embed.weight.device)

    def close(self) -> None:
        """End the threads."""
        self._workers.close()

    def at(self, step: int) -> None:
        """Be what the reference is at an update counted from 0; at the first of a stretch it moves.

        Raises ValueError for an update of another stretch than the one held and the next: its weights are not at hand.
        """
        number, place = divmod(step, self.every)
        if number == self.number:
            return
        if place:
            raise ValueError(f"step {step} is within stretch {number}, and the reference is that of stretch {self.number}.")
        last = min(step + self.every, self.config.train.steps or step + self.every)
        read = np.unique(np.concatenate([self.held_out, *(self.read_at(each) for each in range(step, last))]))
        self.values[read] = score_examples(
            self._moved(), self.rows.score, lambda part: self.rows.reference_batch(read[part]),
            [self.rows.lengths[i] for i in read], self.config.micro_batch_size, self._workers,
        )  # fmt: skip
        self.number = number

    @torch.no_grad()
    def _moved(self) -> Transformer:
        """Return the reference after the move; the first is the policy before its first update."""
        if self.share == 1:
            return self.policy
        policy = {name: weight.to(torch.promote_types(weight.dtype, torch.float32)) for name, weight in self.policy.named_parameters()}
        if not self._weights:
            self._weights = {name: weight.clone() for name, weight in policy.items()}
            return self.policy
        weight = self.policy.embed.weight
        self._model = self._model or self.load().to(weight.device, weight.dtype)
        for name, target in self._model.named_parameters():
            own = self._weights[name] = self._weights[name].to(weight.device)
            target.copy_(own.lerp_(policy[name], self.share))
        return self._model

    def state_dict(self) -> dict[str, Any]:
        """Return the stretch, what was computed at its beginning, and the weights, if there are any."""
        weights = {f"weights/{name}": weight for name, weight in self._weights.items()}
        return {"number": self.number, "values": torch.from_numpy(self.values), **weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.number, self.values[:] = state["number"], state["values"].numpy()
        self._weights = {name.removeprefix("weights/"): weight for name, weight in state.items() if name.startswith("weights/")}
