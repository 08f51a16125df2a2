"""The speed of the training step at a shape, measured with real steps."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.run import usable_cores
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights
from plinth.training.step import open_workers, train_step


@dataclass(frozen=True)
class ThroughputSample:
    """Measured speed of the training step at one shape."""

    tokens_per_s: float
    step_s: float
    peak_memory_bytes: int


def measure_tokens_per_s(
    config: DecoderConfig,
    *,
    micro_batch_size: int,
    seq_len: int,
    dtype: str = "bfloat16",
    optimizer: str = "muon",
    steps: int = 3,
    seed: int = 0,
    num_threads: int | None = None,
) -> ThroughputSample:
    """Time real training steps of a decoder on random tokens, one micro-batch a thread; the median step counts."""
    generator = torch.Generator().manual_seed(seed)
    masters = MasterWeights(Transformer(config).init_weights(generator), DTYPES[dtype])
    update = build_optimizer(masters, OptimizerConfig(name=optimizer))
    threads = num_threads or usable_cores()
    shape = (threads, micro_batch_size, seq_len)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    batches = [(tokens[i], tokens[i]) for i in range(threads)]
    times = []
    with open_workers(threads) as workers:
        for _ in range(steps + 1):
            start = time.perf_counter()
            train_step(masters, causal_lm_loss, batches, update, workers)
            times.append(time.perf_counter() - start)
    step_s = sorted(times[1:])[steps // 2]
    return ThroughputSample(tokens.numel() / step_s, step_s, peak_memory_bytes())


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
