"""Does attention remove the bottleneck of length: how much of a sentence comes over rightly, by its length, with and without it?

An invented language: a sentence is translated word by word through a lexicon and its words come in reverse order. Recurrent models of one
cell, without attention, with additive and with multiplicative attention, see the same sentences of up to a training length, in the same
order; then sentences of each length, longer ones too, are translated greedily. Widths are chosen so that a
training step costs about as many operations as with it. Several seeds; every run is in the record, also those that failed to learn.
Writes benchmarks/records/length_bottleneck.json; takes a while (see `seconds` there).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig
from plinth.ops.dropout import step_seeds
from plinth.training.objectives_recurrent import recurrent_seq2seq_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.schedule import warmup_stable_decay
from plinth.training.step import open_workers, train_step
from record import spread, write_record

PAD, START, END, FIRST = 0, 1, 2, 3


@dataclass(frozen=True)
class World:
    """The invented language and the training on it."""

    words: int = 16
    """of the lexicon"""
    train_len: int = 16
    """longest sentence trained on, words"""
    test_lens: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 32)
    """words of the sentences translated at the end"""
    test_pairs: int = 100
    """sentences of each length"""
    steps: int = 600
    """updates"""
    pairs_per_step: int = 64
    """sentences an update"""
    parts: int = 2
    """micro-batches of an update, each of one length"""
    lr: float = 0.004
    """peak rate of AdamW"""


SMALL = RecurrentSeq2SeqConfig(cell="gru", embedding_size=32, hidden_size=96, dropout=0.0, bidirectional=True)
KINDS = {
    "no attention, last state as first state": replace(SMALL, attention="none", repeat_context=False, hidden_size=136),
    "no attention, last state at each step": replace(SMALL, attention="none", hidden_size=120),
    "additive attention": replace(SMALL, attention="additive"),
    "multiplicative attention": replace(SMALL, attention="multiplicative", hidden_size=112),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=World.steps, help="updates of a run")
    parser.add_argument("--threads", type=int, default=2, help="worker threads")
    arguments = parser.parse_args()
    world = World(steps=arguments.steps)
    runs: dict[str, list[dict]] = {name: [] for name in KINDS}
    for seed in range(arguments.seeds):
        for name, config in KINDS.items():
            runs[name].append(run(world, config, seed, arguments.threads))
            print(f"seed {seed}: {name}: {runs[name][-1]}", flush=True)
        print(write(world, runs, arguments.threads))
    return 0


def write(world: World, runs: dict[str, list[dict]], threads: int) -> Path:
    """Write the record of the runs that there are; after each seed, so that a run that is stopped leaves what it found."""
    rows = [summary(name, KINDS[name], world, found) for name, found in runs.items()]
    return write_record("length_bottleneck", __doc__.splitlines()[0], rows, world=asdict(world), threads=threads)


def pairs(world: World, length: int, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sources (count, length + 1), their ends behind them, and targets (count, length + 1): translated, reversed, then the end."""
    words = rng.integers(world.words, size=(count, length))
    lexicon = np.random.default_rng(12345).permutation(world.words)
    ends = np.full((count, 1), END)
    source, target = np.hstack([FIRST + words, ends]), np.hstack([FIRST + lexicon[words][:, ::-1], ends])
    return torch.from_numpy(source), torch.from_numpy(target)


def batch(world: World, seed: int, step: int, parts: int) -> list[tuple[torch.Tensor, ...]]:
    """Return the micro-batches of a step, each of one length: source, mask, inputs, targets, seeds. A function of seed and step."""
    rng, rows = np.random.default_rng([seed, step]), world.pairs_per_step // parts
    found = []
    for part in range(parts):
        source, target = pairs(world, int(rng.integers(1, world.train_len + 1)), rows, rng)
        inputs = torch.cat([torch.full((rows, 1), START), target[:, :-1]], 1)
        found.append((source, torch.ones_like(source, dtype=torch.bool), inputs, target, step_seeds(seed, step, part, rows)))
    return found


def run(world: World, config: RecurrentSeq2SeqConfig, seed: int, threads: int) -> dict:
    """Train one model and measure it; returns seconds, operations and the scores by length."""
    size = FIRST + world.words
    config = replace(config, source_vocab_size=size, target_vocab_size=size)
    model = RecurrentSeq2Seq(config).init_weights(torch.Generator().manual_seed(seed))
    masters = MasterWeights(model, torch.float32)
    optimizer = build_optimizer(masters, OptimizerConfig(name="adamw", lr=world.lr, weight_decay=0.0))
    loss, flops, started, last = recurrent_seq2seq_loss(), 0.0, time.perf_counter(), 0.0
    with open_workers(threads) as workers:
        for step in range(world.steps):
            micro_batches = batch(world, seed, step, world.parts)
            scale = warmup_stable_decay(step, steps=world.steps, warmup_steps=50, decay_steps=world.steps // 2)
            last = train_step(masters, loss, micro_batches, optimizer, workers, lr_scale=scale).loss_nats
            flops += sum(len(part[0]) * config.train_flops(part[0].shape[1], part[3].shape[1]) for part in micro_batches)
    masters.finish()
    seconds = time.perf_counter() - started
    scores = {length: score(world, model.eval(), length, seed) for length in world.test_lens}
    return {"seconds": seconds, "train_flops": flops, "last_loss_nats": last, "by_length": scores}


@torch.no_grad()
def score(world: World, model: RecurrentSeq2Seq, length: int, seed: int) -> dict[str, float]:
    """Return the share of sentences and of words translated rightly, greedily, and the loss a token when the right ones are given."""
    source, target = pairs(world, length, world.test_pairs, np.random.default_rng([777, seed, length]))
    inputs = torch.cat([torch.full((len(target), 1), START), target[:, :-1]], 1)
    scores_NV = model.logits(model(source, inputs)).flatten(0, 1)
    nats = float(torch.nn.functional.cross_entropy(scores_NV, target.flatten()))
    state, tokens, written = model.begin(model.encode(source)), torch.full((len(target),), START), []
    for _ in range(target.shape[1]):
        scores_BV, state = model.step(tokens, state)
        tokens = scores_BV.argmax(-1)
        written.append(tokens)
    right = torch.stack(written, 1) == target
    return {"exact": float(right.all(1).float().mean()), "words": float(right[:, :-1].float().mean()), "nats": nats}


def summary(name: str, config: RecurrentSeq2SeqConfig, world: World, runs: list[dict]) -> dict:
    """Return a kind's row: its size and cost, and by length the median and range of its runs' scores."""
    size = FIRST + world.words
    model = RecurrentSeq2Seq(replace(config, source_vocab_size=size, target_vocab_size=size))
    by_length = {
        length: {what: spread([one["by_length"][length][what] for one in runs]) for what in ("exact", "words", "nats")}
        for length in world.test_lens
    }
    return {
        "name": name,
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "hidden_size": config.hidden_size,
        "train_flops": spread([one["train_flops"] for one in runs]),
        "seconds": spread([one["seconds"] for one in runs]),
        "by_length": by_length,
        "runs": runs,
    }


if __name__ == "__main__":
    raise SystemExit(main())
