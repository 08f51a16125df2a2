"""What share of a training step is the optimizer's, at 10 M parameters and 16 k tokens a step?

    python benchmarks/optimizer_share.py

A decoder of 6 layers x 384 (10.6 M parameters in the blocks), context 256, 64 sequences a step, every core with its own half of them.
The optimizer's part is the update of the fp32 weights and their rounding into the model, timed alone with real gradients, in
alternation with whole steps; the medians count. Muon with five and with three iterations, and AdamW for everything.
"""

from __future__ import annotations

import argparse
import time

import torch

from plinth.models.config import DecoderConfig
from plinth.models.cost import count_params
from plinth.models.transformer import Transformer
from plinth.run import usable_cores
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights, fastest_dtype
from plinth.training.step import open_workers, split_gradients, train_step
from record import spread, write_record

CONFIG = DecoderConfig(
    vocab_size=4096, hidden_size=384, num_layers=6, num_heads=6, num_kv_heads=6, head_dim=64, intermediate_size=1024, max_seq_len=256
)
SEQUENCES, CONTEXT = 64, 256
ARMS = {
    "muon, 5 iterations": OptimizerConfig(name="muon"),
    "muon, 3 iterations": OptimizerConfig(name="muon", newton_schulz_steps=3),
    "adamw": OptimizerConfig(name="adamw"),
}


def measure(options: OptimizerConfig, rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds of whole steps, and of the optimizer alone."""
    generator = torch.Generator().manual_seed(0)
    masters = MasterWeights(Transformer(CONFIG).init_weights(generator), DTYPES[fastest_dtype()])
    optimizer = build_optimizer(masters, options)
    tokens = torch.randint(CONFIG.vocab_size, (SEQUENCES, CONTEXT + 1), generator=generator)
    batches = [(part[:, :-1], part[:, 1:]) for part in tokens.split(16)]
    steps, alone = [], []
    with open_workers(usable_cores()) as workers:
        grads = dict(zip(masters.names, split_gradients(masters, causal_lm_loss, batches, workers)[3]))
        for _ in range(rounds + 1):
            began = time.perf_counter()
            train_step(masters, causal_lm_loss, batches, optimizer, workers)
            middle = time.perf_counter()
            optimizer.step(grads, 1.0, workers)
            masters.publish(workers)
            steps.append(middle - began)
            alone.append(time.perf_counter() - middle)
    return steps[1:], alone[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = []
    for name, options in ARMS.items():
        steps, alone = measure(options, rounds)
        share = spread([b / a for a, b in zip(steps, alone)])
        rows.append({"name": name, "step_s": spread(steps), "optimizer_s": spread(alone), "share": share})
        print(f"{name}: {1e3 * rows[-1]['optimizer_s']['median']:.0f} ms of {rows[-1]['step_s']['median']:.2f} s, {share['median']:.1%}")
    print(write_record("optimizer_share", "The optimizer's share of a step at 10.6 M parameters and 16,384 tokens a step", rows,
                       params=count_params(CONFIG), cores=usable_cores()))  # fmt: skip


if __name__ == "__main__":
    main()
