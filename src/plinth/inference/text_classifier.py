"""Labels from a classifier on a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from plinth.config import UserError
from plinth.data.features import causal_rows, pad_rows
from plinth.data.labelled import TextExample
from plinth.inference.labelling import Label
from plinth.models.hub import load_model
from plinth.models.text_classifier import TextClassifier
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer

ROWS_A_CALL = 32


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier with its tokenizer."""

    model: TextClassifier
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path) -> LoadedClassifier:
        """Open a run or model folder. Raises UserError when it holds no such classifier."""
        folder = find_model(path)
        model = load_model(folder)
        if not isinstance(model, TextClassifier):
            raise UserError(f"{path} holds no classifier on a language model. Make one with `plinth transfer classify`.")
        return cls(model.eval(), Tokenizer.load(folder))

    @torch.inference_mode()
    def classify(self, examples: Sequence[TextExample], truncate: bool = False) -> list[Label]:
        """Return the label of each text; a text longer than a decoder's context raises UserError unless `truncate`."""
        config = self.model.config
        plain = [TextExample(example.text, example.pair) for example in examples]
        rows = causal_rows(plain, self.tokenizer, {}, config.longest, truncate, config.head.backwards)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        found: list[Label | None] = [None] * len(rows)
        for start in range(0, len(order), ROWS_A_CALL):
            part = order[start : start + ROWS_A_CALL]
            chosen = [rows[i] for i in part]
            tokens = pad_rows(chosen, self.tokenizer.pad_id or 0, max(len(row.tokens) for row in chosen))[0]
            scores = self.model(tokens, torch.tensor([len(row.tokens) for row in chosen]))
            for i, shares in zip(part, scores.float().softmax(-1).tolist()):
                found[i] = Label(config.labels[max(range(len(shares)), key=shares.__getitem__)], dict(zip(config.labels, shares)))
        return [label for label in found if label is not None]
