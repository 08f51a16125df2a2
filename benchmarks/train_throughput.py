"""How many tokens a second does pretraining take in, against what people use on the same CPU?

    python benchmarks/train_throughput.py [--size 6x256 12x512] [--litgpt PYTHON]

All train a decoder on random tokens: transformers' Llama and GPT-2 under its Trainer (fp32 and batch 8 as it comes, and bf16=True),
LitGPT's model and step with the defaults of its `pretrain` (needs the Python of an environment that has litgpt), and a plain PyTorch
GPT with AdamW at batch 16: eager and compiled, fp32 and bf16 autocast. Ours is the project's own step with its defaults, Muon
included, 16,384 tokens an update. Every side runs in a process of its own, one after another; a round's figure is its median step,
and rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from plain_gpt import PlainGPT, build_adamw
from plinth.models.config import DecoderConfig
from plinth.models.cost import count_params, train_flops_per_token
from plinth.ops import kernels
from plinth.ops.roofline import matmul_rate
from plinth.run import usable_cores
from plinth.training.precision import fastest_dtype
from plinth.training.throughput import measure_tokens_per_s
from record import spread, write_record


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    context: int
    micro_batch_size: int
    """our sequences a forward pass"""
    vocab: int = 4096
    tokens_per_step: int = 16_384

    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab, hidden_size=self.width, num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.heads,
            head_dim=self.width // self.heads, intermediate_size=self.width * 8 // 3 // 32 * 32, max_seq_len=self.context,
        )  # fmt: skip


SIZES = {"6x256": Size(6, 256, 4, 256, micro_batch_size=16), "12x512": Size(12, 512, 8, 512, micro_batch_size=8)}


def run_ours(size: Size, steps: int) -> float:
    micro_batches = size.tokens_per_step // (size.micro_batch_size * size.context)
    shape = {"micro_batch_size": size.micro_batch_size, "seq_len": size.context, "micro_batches": micro_batches}
    return measure_tokens_per_s(size.decoder(), dtype=fastest_dtype(), optimizer="muon", steps=max(4, steps), **shape).tokens_per_s


def run_trainer(size: Size, steps: int, kind: str, bf16: bool = False) -> float:
    """Return tokens a second of transformers' Trainer with its defaults."""
    import transformers

    torch.set_num_threads(usable_cores())
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.width * 8 // 3, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, max_position_embeddings=size.context, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=size.vocab, n_embd=size.width, n_layer=size.layers, n_head=size.heads, n_positions=size.context
        )
        model = transformers.GPT2LMHeadModel(config)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    rows = torch.randint(size.vocab, (8 * (steps + 1), size.context))
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, max_steps=steps + 1, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=bf16, use_cpu=True
        )
        transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[Clock()]).train()
    return options.per_device_train_batch_size * size.context / statistics.median(b - a for a, b in zip(times, times[1:]))


def run_plain(size: Size, steps: int, bf16: bool, compiled: bool, batch: int = 16) -> float:
    torch.set_num_threads(usable_cores())
    model = PlainGPT(size.vocab, size.layers, size.width, size.heads, size.context)
    optimizer, forward = build_adamw(model), torch.compile(model) if compiled else model
    times = []
    for _ in range(steps + 3):  # the first steps warm up and compile
        rows = torch.randint(size.vocab, (batch, size.context + 1))
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(rows[:, :-1].contiguous()).flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - started)
    return batch * size.context / statistics.median(times[3:])


SIDES = {
    "plinth pretrain": run_ours,
    "transformers Trainer, Llama, defaults (fp32)": lambda size, steps: run_trainer(size, steps, "llama"),
    "transformers Trainer, GPT-2, defaults (fp32)": lambda size, steps: run_trainer(size, steps, "gpt2"),
    "transformers Trainer, Llama, bf16=True": lambda size, steps: run_trainer(size, steps, "llama", bf16=True),
    "plain PyTorch GPT, eager, fp32": lambda size, steps: run_plain(size, steps, bf16=False, compiled=False),
    "plain PyTorch GPT, eager, bf16 autocast": lambda size, steps: run_plain(size, steps, bf16=True, compiled=False),
    "plain PyTorch GPT, compiled, fp32": lambda size, steps: run_plain(size, steps, bf16=False, compiled=True),
    "plain PyTorch GPT, compiled, bf16 autocast": lambda size, steps: run_plain(size, steps, bf16=True, compiled=True),
}
LITGPT = {"LitGPT pretrain, defaults (compiled, bf16-mixed)": "bf16-mixed", "LitGPT pretrain, compiled, fp32": "32-true"}


def run_side(name: str, size_name: str, steps: int, litgpt: str | None) -> float:
    """Run one side in a process of its own and return its tokens a second."""
    size = SIZES[size_name]
    if name in LITGPT:
        shape = map(str, (size.layers, size.width, size.heads, size.context, size.vocab, steps))
        command = [litgpt, str(Path(__file__).with_name("litgpt_step.py")), *shape, LITGPT[name]]
    else:
        command = [sys.executable, __file__, "--side", name, "--size", size_name, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"]


def compare(size_name: str, options: argparse.Namespace) -> list[dict]:
    names = [*SIDES, *(LITGPT if options.litgpt else {})]
    measured: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            measured[name].append(run_side(name, size_name, options.steps, options.litgpt))
            print(f"{size_name}, round {number + 1}: {name}: {measured[name][-1]:,.0f} tokens/s", flush=True)
    ours = measured["plinth pretrain"]
    return [
        {"name": name, "tokens_per_s": spread(values), "ours_over_this": spread([a / b for a, b in zip(ours, values)])}
        for name, values in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps a round of each side")
    parser.add_argument("--litgpt", help="Python of an environment with litgpt; left out without it")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.manual_seed(0)
        print(json.dumps({"tokens_per_s": SIDES[options.side](SIZES[options.size[0]], options.steps)}))
        return
    for name in options.size:
        size, rows = SIZES[name], compare(name, options)
        decoder, rate = size.decoder(), matmul_rate(fastest_dtype(), num_threads=usable_cores())
        flops = train_flops_per_token(decoder, size.context)
        path = write_record(
            f"train_throughput_{name}", f"Pretraining tokens a second at {name}, context {size.context}, vocabulary {size.vocab}", rows,
            size={"layers": size.layers, "width": size.width, "context": size.context, "tokens_per_step": size.tokens_per_step},
            dtype=fastest_dtype(), kernels=kernels.why_not() or "own", params=count_params(decoder)["total"],
            matmul_flops_per_s=rate, flops_per_token=flops, mfu=rows[0]["tokens_per_s"]["median"] * flops / rate,
        )  # fmt: skip
        for row in rows[1:]:
            ratio = row["ours_over_this"]
            print(f"{ratio['median']:.1f} x {row['name']} ({ratio['min']:.1f} to {ratio['max']:.1f})")
        print(path)


if __name__ == "__main__":
    main()
