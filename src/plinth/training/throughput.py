"""The speed of the training step at a shape, measured with real steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.run import usable_cores
from plinth.training.compile import compiled_blocks
from plinth.training.device import choose_device, device_settings, peak_memory_bytes, synchronize
from plinth.training.graphs import GraphedGradients
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights
from plinth.training.step import open_workers, take_gradients, train_step


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
    device: str | None = "cpu",
    micro_batches: int | None = None,
    compiled: bool = False,
    cuda_graphs: bool = False,
) -> ThroughputSample:
    """Time real training steps of a decoder on random tokens; the median step counts, the first is left out.

    A step has `micro_batches` micro-batches (default: one a thread, on a GPU one). `compiled` and `cuda_graphs` as in TrainConfig.
    """
    device = choose_device(device)
    generator = torch.Generator().manual_seed(seed)
    threads = num_threads or (usable_cores() if device == "cpu" else 1)
    shape = (micro_batches or threads, micro_batch_size, seq_len)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    batches = [(rows, rows) for rows in tokens]
    gradients = GraphedGradients() if cuda_graphs else take_gradients
    times = []
    with device_settings(device), open_workers(threads, device) as workers:
        masters = MasterWeights(Transformer(config).init_weights(generator), DTYPES[dtype], device)
        update = build_optimizer(masters, OptimizerConfig(name=optimizer))
        with compiled_blocks(masters.model, compiled):
            for _ in range(steps + 1):
                start = time.perf_counter()
                train_step(masters, causal_lm_loss, batches, update, workers, gradients=gradients)
                synchronize(device)
                times.append(time.perf_counter() - start)
        step_s = sorted(times[1:])[steps // 2]
        return ThroughputSample(tokens.numel() / step_s, step_s, peak_memory_bytes(device))
