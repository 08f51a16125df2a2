"""Parallel files made ready for training: read, their tokenizers learnt or loaded, what is kept of them published with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from plinth.config import UserError
from plinth.data.parallel import Marks, Pair, ParallelText, read_pairs
from plinth.data.rejects import row_counts
from plinth.inference.translate import TARGET_TOKENIZER
from plinth.models.hub import save_model
from plinth.recipes.parallel_batches import ParallelBatches
from plinth.run import Run, file_sha256
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.step import LossFunction

HELDOUT_ROWS = 64  # pairs a forward pass when the held-out loss is taken


@dataclass(frozen=True)
class PairsConfig:
    """The parallel text of a training, and its batches."""

    epochs: float = 10.0
    """passes over the pairs"""
    pairs_per_step: int = 128
    """pairs an update"""
    micro_batch_size: int = 64
    """pairs a forward pass"""
    tokenizer_size: int = 8000
    """entries at most of a tokenizer that is trained here"""
    shared_vocabulary: bool = True
    """one tokenizer, trained on both sides; otherwise one each"""
    max_seq_len: int = 128
    """longest side of a pair in tokens, its end included; longer pairs are left out and counted"""
    prefix: str = ""
    """text put before each source, such as T5's 'translate English to German: '"""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be positive.")
        for name in ("pairs_per_step", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.max_seq_len < 2:
            raise UserError(f"max_seq_len={self.max_seq_len} has room for no token beside the end. Use at least 2.")


@dataclass(frozen=True)
class Tokenizers:
    """What turns both sides into tokens."""

    source: Tokenizer
    target: Tokenizer

    @property
    def shared(self) -> bool:
        return self.source.sha256 == self.target.sha256

    @property
    def marks(self) -> Marks:
        """The ids around a sentence. Raises UserError when the two tokenizers differ in them."""
        marks = Marks.of(self.target)
        if Marks.of(self.source) != marks:
            raise UserError("the two tokenizers number <|pad|> and <|endoftext|> differently. Train them with `plinth tokenizer train`.")
        return marks

    def publish(self, model: nn.Module, folder: Path) -> None:
        """Write a model folder with the source's tokenizer, and the target's in a folder of its own where it differs."""
        save_model(model, self.source, folder)
        if not self.shared:
            self.target.save(folder / TARGET_TOKENIZER)


def read_parallel(files: Sequence[Path], config: PairsConfig) -> tuple[list[Pair], int]:
    """Read the files, the prefix before each source; returns the pairs and how many had an empty side."""
    pairs, empty = read_pairs(files)
    return [Pair(config.prefix + pair.source, pair.target) for pair in pairs] if config.prefix else pairs, empty


def find_tokenizers(out: Path, pairs: Sequence[Pair], config: PairsConfig, given: Sequence[Path], resume: bool) -> Tokenizers:
    """Return the tokenizers of a run: those that are given (one, or source and target), those it began with, or newly trained ones."""
    folders = list(given) or ([each for each in tokenizer_folders(out, config) if each.is_dir()] if resume else [])
    if len(folders) > 2:
        raise UserError(f"{len(folders)} tokenizers are named; a translation has a source's and a target's.")
    if folders:
        loaded = [Tokenizer.load(folder) for folder in folders]
        return Tokenizers(loaded[0], loaded[-1])
    sides = [[pair.source for pair in pairs], [pair.target for pair in pairs]]
    texts = [sides[0] + sides[1]] if config.shared_vocabulary else sides
    trained = [train_tokenizer(each, config.tokenizer_size) for each in texts]
    return Tokenizers(trained[0], trained[-1])


def tokenizer_folders(out: Path, config: PairsConfig) -> list[Path]:
    """Return where a run keeps the tokenizers that it trained."""
    return [out / "tokenizer"] if config.shared_vocabulary else [out / "tokenizer", out / TARGET_TOKENIZER]


def keep_tokenizers(run: Run, tokenizers: Tokenizers, config: PairsConfig) -> None:
    """Write a run's tokenizers into it, so that resuming need not train them again."""
    for folder, tokenizer in zip(tokenizer_folders(run.path, config), (tokenizers.source, tokenizers.target)):
        if not folder.is_dir():
            tokenizer.save(folder)


@dataclass(frozen=True)
class TranslationData:
    """The batches of a training on parallel text, and what is said of them."""

    text: ParallelText
    batches: ParallelBatches
    tokenizers: Tokenizers
    files: tuple[Path, ...]
    empty: int
    """pairs left out because a side is empty"""

    @classmethod
    def open(cls, files: Sequence[Path], pairs: Sequence[Pair], empty: int, tokenizers: Tokenizers, config: PairsConfig, seed: int):
        marks = tokenizers.marks
        text = ParallelText(
            pairs, tokenizers.source, tokenizers.target, source_marks=marks, target_marks=marks, max_seq_len=config.max_seq_len
        )
        return cls(text, ParallelBatches(text, config.pairs_per_step, config.micro_batch_size, seed), tokenizers, tuple(files), empty)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the data: a run resumed on other data is refused."""
        hashes = {"source_tokenizer": self.tokenizers.source.sha256, "target_tokenizer": self.tokenizers.target.sha256}
        return {f"file_{i}": file_sha256(file) for i, file in enumerate(self.files)} | hashes | {"pairs": len(self.text)}

    def describe(self, step: int, rows: Sequence[int] | None) -> str:
        """Name the pairs in some rows of a step."""
        return self.batches.describe(step, rows, lambda ids: self.tokenizers.source.decode(ids))

    def counts(self, steps: int) -> dict[str, Any]:
        """Return what a run's summary says of its data."""
        return {
            "pairs": len(self.text),
            **row_counts(too_long=self.text.num_too_long, unusable=self.empty),
            "epochs": steps / self.batches.steps_per_epoch,
            "source_vocab_size": self.tokenizers.source.vocab_size,
            "target_vocab_size": self.tokenizers.target.vocab_size,
        }

    @torch.no_grad()
    def heldout(self, model: nn.Module, loss: LossFunction, pairs: Sequence[Pair]) -> dict[str, float]:
        """Return a model's mean loss in nats a target token on held-out pairs, beside that of the tokens' frequencies in training."""
        marks, longest = self.text.target_marks, None
        text = ParallelText(
            pairs, self.tokenizers.source, self.tokenizers.target, source_marks=marks, target_marks=marks, max_seq_len=longest
        )
        total, count, unigram = 0.0, 0.0, 0.0
        frequencies = self.unigram_nats()
        order = np.argsort(text.lengths, kind="stable")
        for part in np.split(order, range(HELDOUT_ROWS, len(order), HELDOUT_ROWS)):
            batch = text.batch(part)
            batch_loss, batch_count, _ = loss(model, batch)
            total, count = total + float(batch_loss), count + float(batch_count)
            unigram += float(frequencies[batch[3][batch[3] >= 0].numpy()].sum())
        return {"heldout_nats": total / count, "heldout_unigram_nats": unigram / count, "heldout_tokens": count}

    def unigram_nats(self) -> np.ndarray:
        """Return each target token's negative log-frequency in training, float64 (V,); one is added to each count."""
        counts = np.ones(self.tokenizers.target.vocab_size)  # one of each, so that none is impossible
        for i in range(len(self.text)):
            np.add.at(counts, self.text.targets[i], 1.0)
        return -np.log(counts / counts.sum())
