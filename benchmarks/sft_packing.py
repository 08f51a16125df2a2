"""How should finetuning put conversations of unequal length into batches?

    python benchmarks/sft_packing.py [--rounds 3] [--conversations 128]

Forward and backward over the same conversations of random tokens, whose lengths are spread as those of the data set hh-rlhf are
(log-normal), dealt by `plinth sft` three ways, in alternation: rows of like lengths, padded; rows of the context's length packed by best
fit; and each micro-batch one row without padding. The last half of each conversation is learnt. At 64 conversations a step and at 8, where
fewer of like length are at hand. The figure is conversation tokens a second of one core's time; ratios are of neighbouring rounds.
Writes benchmarks/records/sft_packing.json.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.posttraining.batches import pack_rows, pad_rows
from plinth.posttraining.sft import deal_examples
from plinth.posttraining.sft_config import SftConfig
from plinth.tokenizer.chat import Rendered
from plinth.training.objectives import causal_lm_loss
from plinth.training.precision import DTYPES, MasterWeights
from plinth.training.step import open_workers, split_gradients
from record import spread, write_record

CONTEXT = 256
WAYS = ("padded", "packed", "end to end")
SIZE = {"vocab_size": 8192, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "max_seq_len": CONTEXT}
MODELS = {
    "Plinth's shape": DecoderConfig(**SIZE, intermediate_size=768),
    "Llama's shape": DecoderConfig(**SIZE, intermediate_size=768, qk_norm=False, learnable_norm=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=128)
    arguments = parser.parse_args()
    examples = conversations(arguments.conversations)
    rows = []
    for name, config in MODELS.items():
        for dtype in DTYPES:
            for sizes in ((64, 32), (8, 8)):
                rows.append({"model": name, "dtype": dtype, **measure(config, dtype, examples, sizes, arguments.rounds)})
                print(rows[-1], flush=True)
    write_record(
        "sft_packing",
        "How should finetuning put conversations of unequal length into batches?",
        rows,
        size=SIZE,
        conversations=arguments.conversations,
    )
    return 0


def conversations(count: int) -> list[Rendered]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(75), 0.7, count).astype(int), 16, CONTEXT)
    return [Rendered(rng.integers(0, SIZE["vocab_size"], n).tolist(), [i >= n // 2 for i in range(n)]) for n in lengths]


def measure(config: DecoderConfig, dtype: str, examples: list[Rendered], sizes: tuple[int, int], rounds: int) -> dict:
    """Time an epoch dealt each way, in alternation, the first round not counted."""
    masters = MasterWeights(Transformer(config).init_weights(torch.Generator().manual_seed(0)), DTYPES[dtype])
    lengths = [len(example.tokens) for example in examples]
    batches = {way: batches_of(way, examples, lengths, sizes) for way in WAYS}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with open_workers(1) as workers:
        for number in range(rounds + 1):
            for way in WAYS if number % 2 else WAYS[::-1]:
                started = time.process_time()
                for step in batches[way]:
                    split_gradients(masters, causal_lm_loss, step, workers)
                if number:
                    rates[way].append(sum(lengths) / (time.process_time() - started))
    inputs = {way: sum(part[0].numel() for step in batches[way] for part in step) for way in WAYS}
    return {
        "conversations_per_step": sizes[0],
        "fill": {way: (sum(lengths) - len(lengths)) / inputs[way] for way in WAYS},
        "tokens_per_s": {way: spread(rates[way]) for way in WAYS},
        "over_padded": {way: spread([b / a for a, b in zip(rates["padded"], rates[way])]) for way in WAYS[1:]},
    }


def batches_of(way: str, examples: list[Rendered], lengths: list[int], sizes: tuple[int, int]) -> list[list[tuple]]:
    """Return the micro-batches of each step of an epoch."""
    settings = SftConfig(packing=way == "packed", unpadded=way == "end to end", conversations_per_step=sizes[0], micro_batch_size=sizes[1])
    deal = deal_examples(lengths, settings, CONTEXT)
    steps = [[[[examples[i] for i in row] for row in part] for part in deal.rows(step)] for step in range(deal.steps_per_epoch)]
    if way != "padded":
        return [[pack_rows(part, 0) for part in step] for step in steps]
    return [[pad_rows([row[0].tokens for row in part], [row[0].loss_mask for row in part], 0) for part in step] for step in steps]


if __name__ == "__main__":
    raise SystemExit(main())
