"""The pretraining mix of PPO-ptx: texts whose cross-entropy stands in the loss of every update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from plinth.posttraining.batches import pad_rows
from plinth.posttraining.formats import read_examples
from plinth.tokenizer.encode import Tokenizer

Mix = dict[str, torch.Tensor]


class PretrainMix:
    """Deals texts to updates; a pure function of (seed, step).

    The loss of an update is Σ over the completions' N tokens plus coef · N · mean over the texts' tokens, all divided by N, whatever the
    split into micro-batches: so each micro-batch of texts carries the weight of one of its tokens.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
    """

    def __init__(self, rows: Sequence[Sequence[int]], coef: float, micro_batch_size: int, seed: int, pad_id: int = 0):
        self.rows, self.coef, self.micro_batch_size, self.seed, self.pad_id = rows, coef, micro_batch_size, seed, pad_id

    def batches(self, step: int, count: int, completion_tokens: int) -> list[Mix]:
        """Return micro-batches {"inputs", "targets" (B, T), "weight" (scalar)} of `count` texts, each text once a pass over all."""
        total = len(self.rows)
        places = range(step * count, (step + 1) * count)
        orders = {turn: np.random.Generator(np.random.PCG64([self.seed, turn])).permutation(total) for turn in {p // total for p in places}}
        chosen = sorted((int(orders[place // total][place % total]) for place in places), key=lambda i: len(self.rows[i]))
        weight = self.coef * completion_tokens / sum(len(self.rows[i]) - 1 for i in chosen)
        parts = [chosen[i : i + self.micro_batch_size] for i in range(0, count, self.micro_batch_size)]
        return [self._batch([self.rows[i] for i in part], weight) for part in parts]

    def _batch(self, rows: Sequence[Sequence[int]], weight: float) -> Mix:
        inputs, targets = pad_rows(rows, [[True] * len(row) for row in rows], self.pad_id)
        return {"inputs": inputs, "targets": targets, "weight": torch.tensor(weight)}


def read_texts(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Return each text as pretraining has it: between two <|endoftext|>, as far as the vocabulary has one, cut behind `max_tokens` + 1."""
    examples = read_examples(path, "text")
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    end = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    encoded = tokenizer.encode_batch([row.text for row in examples.rows])
    rows = [(start + list(tokens) + end)[: max_tokens + 1] for tokens in encoded]
    return [row for row in rows if len(row) > 1]
