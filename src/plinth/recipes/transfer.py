"""What the experiments on hyper-parameter transfer share: a family of decoders of one text, from narrow and shallow to wide and deep."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow.parquet
import torch

from plinth.config import UserError
from plinth.data.curate import CurateConfig, curate
from plinth.data.loader import TokenLoader
from plinth.data.shards import pack_corpus, read_manifest
from plinth.data.sources import read_documents
from plinth.models.config import DecoderConfig
from plinth.recipes.pretraining import split_rows
from plinth.run import publish_dir, usable_cores
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import Optimizer, OptimizerConfig, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights
from plinth.training.step import Workers, train_step
from plinth.training.transfer import Name, Parametrization, init_model, scales

Along = Literal["width", "depth"]
DEFAULT_VOCAB_SIZE = 1024  # of the tokenizer trained on the embedded text: the head of a narrow model should not be all of it


@dataclass(frozen=True)
class Size:
    """A member of a family."""

    width: int
    depth: int


@dataclass(frozen=True)
class Family:
    """Decoders that differ in width and depth only: heads and feed-forward layer grow with the width."""

    base_width: int = 64
    """hidden_size at which all parametrisations are the same"""
    base_depth: int = 2
    """num_layers at which all parametrisations are the same"""
    head_dim: int = 32
    """width of a head; wider models have more of them"""
    tie_embeddings: bool = True
    """use the embedding matrix as output head"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """what moves the hidden matrices"""
    seq_len: int = 128
    """tokens a sequence"""
    sequences_per_step: int = 16
    """sequences an update"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the computation"""
    seed: int = 0
    """seed of initial weights and order of batches"""

    def decoder(self, width: int, depth: int, vocab_size: int) -> DecoderConfig:
        """Return the family's member. Raises UserError for a width that is no multiple of head_dim."""
        if width < 1 or width % self.head_dim:
            raise UserError(f"width {width} is not a multiple of head_dim={self.head_dim}. Use multiples of it, or lower --head-dim.")
        heads = width // self.head_dim
        return DecoderConfig(
            vocab_size=vocab_size, hidden_size=width, num_layers=depth, num_heads=heads, num_kv_heads=heads, head_dim=self.head_dim,
            intermediate_size=3 * width, max_seq_len=self.seq_len, tie_embeddings=self.tie_embeddings,
        )  # fmt: skip

    def simplest(self, name: Name, size: Size) -> Name:
        """Return the simplest one that is the same there: CompleteP is muP at the base depth, muP standard at the base width."""
        if name == "completep" and size.depth == self.base_depth:
            name = "mup"
        return "standard" if name == "mup" and size.width == self.base_width else name

    def parametrization(self, name: Name) -> Parametrization:
        """Return a parametrisation with this family's base."""
        base = {"standard": {}, "mup": {"base_width": self.base_width}}
        return Parametrization(name, **base.get(name, {"base_width": self.base_width, "base_depth": self.base_depth}))


class Learner:
    """One decoder in training: its weights, its optimizer, and steps on given batches."""

    def __init__(self, family: Family, size: Size, vocab_size: int, name: Name, rates: OptimizerConfig, seed: int, workers: Workers):
        config, parametrization = family.decoder(size.width, size.depth, vocab_size), family.parametrization(name)
        model = init_model(config, parametrization, torch.Generator().manual_seed(seed))
        self.masters = MasterWeights(model, DTYPES[family.dtype])
        self.optimizer: Optimizer = build_optimizer(self.masters, rates, scales(model, parametrization, rates.name))
        self.workers = workers
        self.branch_factor = parametrization.branch_factor(config)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], lr_scale: float = 1.0) -> float:
        """Do one update on the rows of a batch, split over the workers; return its loss in nats a token."""
        rows = -(-len(batch[0]) // self.workers.num_threads)
        return train_step(self.masters, causal_lm_loss, split_rows(batch, rows), self.optimizer, self.workers, lr_scale=lr_scale).loss_nats


class Text(NamedTuple):
    """What the family is trained and measured on."""

    train: TokenLoader
    heldout: TokenLoader
    vocab_size: int
    sha256: dict[str, str]


def open_text(shards: Path | None, work: Path, family: Family, say: Callable[[str], None]) -> Text:
    """Open token shards; without them the embedded text is curated and packed under `work`, once."""
    if shards is None:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work / ".text.lock"):
            shards = _pack_default_text(work, say)
    manifest = read_manifest(shards)
    train, heldout = (
        TokenLoader(shards, family.seq_len, family.sequences_per_step, family.seed, split=split) for split in ("train", "heldout")
    )
    return Text(train, heldout, manifest["vocab_size"], manifest["sha256"])


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock, which the system frees when the process ends in any way; gives False when it is taken and not awaited."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _pack_default_text(work: Path, say: Callable[[str], None]) -> Path:
    corpus, tokenizer, shards = (work / name for name in ("corpus", "tokenizer", "shards"))
    if not corpus.exists():
        say("curating the embedded text (the standard library of this Python)")
        curate(read_documents(["stdlib"]), corpus, CurateConfig())
    if not tokenizer.exists():
        texts = pyarrow.parquet.read_table(corpus / "train.parquet", columns=["text"])["text"].to_pylist()
        with publish_dir(tokenizer) as folder:
            train_tokenizer(texts, DEFAULT_VOCAB_SIZE).save(folder)
    if not shards.exists():
        pack_corpus(corpus, Tokenizer.load(tokenizer), shards)
    return shards


def seconds_a_step(family: Family, sizes: Sequence[Size], vocab_size: int, batch, workers: Workers) -> dict[Size, float]:
    """Measure the step of each size with two real steps after a first one."""
    rates = OptimizerConfig(name=family.optimizer)
    seconds = {}
    for size in sizes:
        learner = Learner(family, size, vocab_size, "standard", rates, family.seed, workers)
        learner.step(batch)
        started = time.perf_counter()
        for _ in range(2):
            learner.step(batch)
        seconds[size] = (time.perf_counter() - started) / 2
    return seconds


def threads(family: Family) -> int:
    """Return how many threads the rows of a step are split over."""
    return min(usable_cores(), family.sequences_per_step)


def say_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def ordered(values: Sequence[int], what: str) -> Iterator[int]:
    """Yield sizes in rising order. Raises UserError when there are fewer than two different ones."""
    if len(set(values)) < 2:
        raise UserError(f"{what}={list(values)} holds fewer than two different sizes; a slope needs two. Name more.")
    yield from sorted(set(values))


def compared(along: Along, named: tuple[Name, ...] | None) -> tuple[Name, ...]:
    """Return the parametrisations that are named, else those that differ along a size."""
    defaults: dict[Along, tuple[Name, ...]] = {"width": ("standard", "mup"), "depth": ("mup", "completep")}
    return named or defaults[along]


def varied(family: Family, along: Along, widths: Sequence[int], depths: Sequence[int]) -> list[Size]:
    """Return the sizes along one of the two, in rising order; the other stays at its base."""
    if along == "width":
        return [Size(width, family.base_depth) for width in ordered(widths, "widths")]
    return [Size(family.base_width, depth) for depth in ordered(depths, "depths")]
