"""How many tokens a second does pretraining take in, against transformers' Trainer with its defaults on the same machine?

    python benchmarks/train_throughput.py

All train a decoder of 6 layers x 256, context 256, vocabulary 4,096, on random tokens. The peers are transformers' Llama
and GPT-2 under its Trainer: fp32 and batch 8 as it comes, and Llama again with bf16=True. Ours is the project's own step with
its defaults: bf16 where the processor has the units, fp32 master weights, Muon, gradients of the whole batch before each
update. A round runs each for a few steps, one after another; a round's figure is its median step. Rounds alternate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from plinth.models.config import DecoderConfig
from plinth.models.cost import count_params
from plinth.run import usable_cores
from plinth.training.precision import fastest_dtype
from plinth.training.throughput import measure_tokens_per_s
from record import spread, write_record

LAYERS, WIDTH, HEADS, CONTEXT, VOCAB = 6, 256, 4, 256, 4096


def run_trainer(kind: str, steps: int, bf16: bool = False) -> float:
    """Return tokens a second of transformers' Trainer with its defaults."""
    import transformers

    torch.set_num_threads(usable_cores())
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=683, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT)
        model = transformers.GPT2LMHeadModel(config)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    rows = torch.randint(VOCAB, (8 * (steps + 1), CONTEXT))
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, max_steps=steps + 1, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=bf16, use_cpu=True
        )
        trainer = transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[Clock()])
        trainer.train()
    step_s = statistics.median(b - a for a, b in zip(times, times[1:]))
    return options.per_device_train_batch_size * CONTEXT / step_s


def run_ours(steps: int, micro_batch_size: int) -> float:
    """Return tokens a second of the project's training step."""
    config = DecoderConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=HEADS, head_dim=WIDTH // HEADS,
        intermediate_size=672, max_seq_len=CONTEXT,
    )  # fmt: skip
    shape = {"micro_batch_size": micro_batch_size, "seq_len": CONTEXT}
    return measure_tokens_per_s(config, dtype=fastest_dtype(), optimizer="muon", steps=steps, **shape).tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps a round of each side")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="our sequences a forward pass")
    options = parser.parse_args()
    sides = {
        "plinth pretrain": lambda: run_ours(options.steps, options.micro_batch_size),
        "transformers Trainer, Llama, defaults (fp32)": lambda: run_trainer("llama", options.steps),
        "transformers Trainer, GPT-2, defaults (fp32)": lambda: run_trainer("gpt2", options.steps),
        "transformers Trainer, Llama, bf16=True": lambda: run_trainer("llama", options.steps, bf16=True),
    }
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name, run in sides.items():
            measured[name].append(run())
            print(f"round {number + 1}: {name}: {measured[name][-1]:,.0f} tokens/s", flush=True)
    ours = measured["plinth pretrain"]
    rows = [
        {"name": name, "tokens_per_s": spread(values), "ours_over_this": spread([a / b for a, b in zip(ours, values)])}
        for name, values in measured.items()
    ]
    path = write_record(
        "train_throughput", "Pretraining tokens a second at 6 layers x 256, context 256, vocabulary 4,096", rows,
        dtype=fastest_dtype(), params=count_params(DecoderConfig(vocab_size=VOCAB, intermediate_size=672))["total"],
    )  # fmt: skip
    for row in rows[1:]:
        ratio = row["ours_over_this"]
        print(f"{ratio['median']:.1f} x {row['name']} ({ratio['min']:.1f} to {ratio['max']:.1f})")
    print(path)


if __name__ == "__main__":
    main()
