"""What does it save to compute a pair's prompt once? Loss and gradient of the same pairs, as separate rows and as shared ones.

    python benchmarks/shared_prefix.py     # about a minute on one core

Both ways alternate; processor time of one thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.posttraining.log_probs import sequence_log_probs, shared_log_probs
from plinth.posttraining.pairs import pad_sides, share_sides, shared_rows_of
from plinth.tokenizer.chat import Rendered
from plinth.training.precision import DTYPES
from record import spread, write_record

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 64,
    "intermediate_size": 768,
}
LENGTHS = ((12, 12), (30, 12), (120, 40), (300, 60))
PAIRS, ROUNDS = 16, 5


def draw_pairs(prompt: int, answer: int, rng: random.Random) -> list[tuple[Rendered, Rendered]]:
    """Return pairs of random tokens with about these lengths."""
    pairs = []
    for _ in range(PAIRS):
        start = [rng.randrange(SHAPE["vocab_size"]) for _ in range(max(2, round(rng.gauss(prompt, 0.05 * prompt))))]
        ends = [[rng.randrange(SHAPE["vocab_size"]) for _ in range(max(1, round(rng.gauss(answer, 0.2 * answer))))] for _ in range(2)]
        one, other = (Rendered(start + end, [False] * len(start) + [True] * len(end)) for end in ends)
        pairs.append((one, other))
    return pairs


def seconds(log_probs: Callable[[], torch.Tensor], weights: torch.Tensor, parameters: list[torch.Tensor]) -> float:
    """Return the processor time of forward and backward."""
    began = time.process_time()
    torch.autograd.grad((log_probs().flatten() * weights).sum(), parameters)
    return time.process_time() - began


def compare(dtype: str, prompt: int, answer: int) -> dict:
    """Return a row of the table."""
    model = Transformer(DecoderConfig(**SHAPE)).init_weights(torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    pairs = draw_pairs(prompt, answer, random.Random(0))
    inputs, targets = (part.flatten(0, 1) for part in pad_sides(pairs, 0))
    batch = share_sides(pairs, 0)
    parameters, weights = list(model.parameters()), torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(0))
    rounds = []
    for _ in range(ROUNDS + 1):
        apart = seconds(lambda: sequence_log_probs(model, inputs, targets), weights, parameters)
        together = seconds(lambda: shared_log_probs(model, *batch[:2], shared_rows_of(batch)), weights, parameters)
        rounds.append((apart, together))
    rounds = rounds[1:]  # the first one builds what is built once
    return {
        "dtype": dtype, "prompt": prompt, "answer": answer, "token_share": batch[0].numel() / inputs.numel(),
        "separate_s": spread([a for a, _ in rounds]), "shared_s": spread([b for _, b in rounds]),
        "time_share": spread([b / a for a, b in rounds]),
    }  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    rows = [compare(dtype, *lengths) for dtype in ("bfloat16", "float32") for lengths in LENGTHS]
    for row in rows:
        print(row["dtype"], row["prompt"], row["answer"], round(row["token_share"], 2), round(row["time_share"]["median"], 2))
    write_record("shared_prefix", "What does it save to compute a pair's prompt once?", rows, shape=SHAPE, pairs=PAIRS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
