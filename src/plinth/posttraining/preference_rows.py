"""What preference tuning learns from, pairs or labelled answers, as the batches of a loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from plinth.models.transformer import Transformer
from plinth.posttraining.pair_scores import down_sampled
from plinth.posttraining.pairs import Pair, pad_sides, row_tokens, share_sides
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.preference_objective import pairs_loss, reference_pairs_log_probs, sides_log_probs
from plinth.posttraining.unpaired import LabelledAnswer, reference_point, unpaired_loss
from plinth.training.device import choose_device, move_batch
from plinth.training.step import Batch, InlineWorker, Workers, start_workers


class PairedRows:
    """Pairs as batches of a loss of pairs."""

    def __init__(self, pairs: Sequence[Pair], config: DpoConfig, pad_id: int):
        self.pairs, self.config, self.pad_id = pairs, config, pad_id
        self.lengths = [row_tokens((pair.chosen, pair.rejected)) + 1 for pair in pairs]
        self.total_tokens = sum(len(pair.chosen.tokens) + len(pair.rejected.tokens) for pair in pairs)
        self.needs_reference = config.needs_reference
        self.answers = [(sum(pair.chosen.loss_mask), sum(pair.rejected.loss_mask)) for pair in pairs]
        self.width = max(map(max, self.answers), default=1)
        self.sides = 2 * self.width if config.down_sample else 2
        self.soft = sum(pair.probability is not None for pair in pairs)
        self.epsilon = torch.tensor([0.0 if pair.probability is None else 1 - pair.probability for pair in pairs])
        self.reads_epsilon = "cdpo" in config.parts and config.epsilon is None and self.soft > 0

    def joined(self, other: PairedRows) -> PairedRows:
        """Return these pairs and others behind them."""
        return PairedRows([*self.pairs, *other.pairs], self.config, self.pad_id)

    def open(self, num_threads: int) -> None:
        """Do nothing: pairs need no threads of their own."""

    def close(self) -> None:
        """Do nothing."""

    def reference_batch(self, part: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return the sequences whose log-probabilities under the reference the loss reads."""
        return share_sides([(self.pairs[i].chosen, self.pairs[i].rejected) for i in part], self.pad_id)

    def score(self, model: Transformer, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the log-probabilities of a reference batch, (B, sides)."""
        return reference_pairs_log_probs(model, batch, self.config, self.width)

    def batches(self, parts: Sequence[np.ndarray], reference: np.ndarray, policy: Transformer, step: int = 0) -> list[Batch]:
        """Return a step's micro-batches."""
        return [self._batch(part, torch.from_numpy(reference[part]), step) for part in parts]

    def _batch(self, part: np.ndarray, reference: torch.Tensor, step: int) -> Batch:
        more = (self.epsilon[torch.from_numpy(part)],) if self.reads_epsilon else ()
        if self.config.down_sample:
            kept_B2W = down_sampled([self.answers[i] for i in part], [(self.config.train.seed, step, int(i)) for i in part])
            reference = (reference.unflatten(1, (2, -1))[:, :, : kept_B2W.shape[2]] * kept_B2W).sum(2)
            more = (*more, kept_B2W)
        return (*self.reference_batch(part), reference, *more)

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

    def joined(self, other: LabelledRows) -> LabelledRows:
        """Return these answers and others behind them."""
        return LabelledRows([*self.answers, *other.answers], self.config, self.pad_id)

    def open(self, num_threads: int) -> None:
        """Let so many threads of a CPU measure the reference point."""
        self._workers = start_workers(num_threads, self.device)

    def close(self) -> None:
        """End the threads."""
        self._workers.close()

    def reference_batch(self, part: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return the sequences whose log-probabilities under the reference the loss reads: the answers, and kto's mismatched ones."""
        rows = [self.answers[i] for i in part]
        return pad_sides([[row.answer] if row.mismatched is None else [row.answer, row.mismatched] for row in rows], self.pad_id)

    def score(self, model: Transformer, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the log-probabilities of a reference batch, (B, sides)."""
        return sides_log_probs(model, *batch)

    def batches(self, parts: Sequence[np.ndarray], reference: np.ndarray, policy: Transformer, step: int = 0) -> list[Batch]:
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
