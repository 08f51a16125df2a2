"""Where does the time of one training step on the CPU go, and how far is each part from its floor?

    python benchmarks/step_budget.py

One thread runs micro-batches under PyTorch's profiler; the time of each operation counts for one part. A part's floor is the larger of
its operations over one core's measured rate of a large bf16 matrix product and its bytes, each tensor read or written once, over the
measured bandwidth of a large copy by all cores. The optimizer's part is timed on all cores, as it runs.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from plinth.models.config import DecoderConfig
from plinth.models.cost import count_params
from plinth.models.transformer import Transformer
from plinth.ops import kernels
from plinth.ops.roofline import copy_bandwidth, matmul_rate
from plinth.run import usable_cores
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights, fastest_dtype
from plinth.training.step import open_workers, train_step
from record import write_record
from train_throughput import SIZES, Size

PARTS = {
    "matrix products, forward and to the inputs": ("aten::mm", "aten::addmm", "aten::bmm"),
    "gradients of the weights": ("_KernelLinearBackward", "_KernelCrossEntropyBackward"),
    "attention": ("_KernelAttention", "_KernelAttentionBackward", "_FusedAttention", "_FusedAttentionBackward"),
    "gate (SwiGLU)": ("_SwiGLU", "_SwiGLUBackward"),
    "norms and residual sums": ("_AddRMSNorm", "_AddRMSNormBackward"),
    "cross-entropy, and the head's weight gradient": ("_KernelCrossEntropy", "_LinearCrossEntropy"),
}
REST = "everything else (embedding, Python, autograd)"


def floors(config: DecoderConfig, tokens: int, seq_len: int) -> dict[str, tuple[float, float]]:
    """Return (operations, bytes) of each part for `tokens` tokens, forward and backward."""
    L, D, F, V = config.num_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    matrix, head = count_params(config)["matrix"], V * D
    width = config.num_heads * config.head_dim
    row = 2 * (D + 3 * width + width + D + 2 * F + F + D)  # bf16: what the products of a layer read and write, once
    return {
        "matrix products, forward and to the inputs": (4.0 * tokens * (matrix + head), 2.0 * tokens * L * row),
        "gradients of the weights": (2.0 * tokens * matrix, tokens * L * row),
        "attention": (7 * 2.0 * tokens * L * width * (seq_len + 1) / 2, tokens * L * 2.0 * (3 + 1 + 3 + 1 + 1 + 3) * width),
        "gate (SwiGLU)": (0.0, tokens * L * 2.0 * (3 * F + 5 * F)),
        "norms and residual sums": (0.0, tokens * (2 * L + 1) * 2.0 * 8 * D),
        "cross-entropy, and the head's weight gradient": (2.0 * tokens * head, 2.0 * tokens * 5 * V),
    }


def measure_parts(masters: MasterWeights, rows: torch.Tensor, repeats: int) -> tuple[dict[str, float], float]:
    """Return seconds of each part a micro-batch on one core, and the whole without the profiler."""

    def micro_batch() -> None:
        loss, _, _ = causal_lm_loss(masters.model, (rows, rows))
        torch.autograd.grad(loss, masters.parameters)

    with open_workers(1) as workers:

        def run(_: int) -> tuple[dict[str, float], float]:
            times = []
            for _ in range(repeats + 2):
                start = time.perf_counter()
                micro_batch()
                times.append(time.perf_counter() - start)
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                for _ in range(repeats):
                    micro_batch()
            return {event.key: event.self_cpu_time_total / 1e6 / repeats for event in trace.key_averages()}, sorted(times[2:])[repeats // 2]

        events, whole = workers.map(run, [0])[0]
    parts = {name: sum(events.get(key, 0.0) for key in keys) for name, keys in PARTS.items()}
    return parts, whole


def measure_optimizer(masters: MasterWeights, rows: torch.Tensor, repeats: int) -> float:
    """Return the seconds that an update takes beyond its gradients: a step minus its gradients, on all cores."""
    optimizer = build_optimizer(masters, OptimizerConfig())
    spent = []
    step = optimizer.step

    def timed(*arguments) -> None:
        start = time.perf_counter()
        step(*arguments)
        spent.append(time.perf_counter() - start)

    optimizer.step = timed
    with open_workers(usable_cores()) as workers:
        for _ in range(repeats + 1):
            train_step(masters, causal_lm_loss, [(rows, rows)] * workers.num_threads, optimizer, workers)
    return sorted(spent[1:])[repeats // 2]


def budget(size: Size, repeats: int) -> tuple[list[dict], dict]:
    config, dtype = size.decoder(), fastest_dtype()
    masters = MasterWeights(Transformer(config).init_weights(torch.Generator().manual_seed(0)), DTYPES[dtype])
    rows = torch.randint(size.vocab, (size.micro_batch_size, size.context), generator=torch.Generator().manual_seed(1))
    rate, bandwidth = matmul_rate(dtype, num_threads=1), copy_bandwidth()
    parts, whole = measure_parts(masters, rows, repeats)
    parts[REST] = max(0.0, whole - sum(parts.values()))
    least = floors(config, rows.numel(), size.context)
    result = []
    for name, seconds in parts.items():
        flops, size_bytes = least.get(name, (0.0, 0.0))
        floor = max(flops / rate, size_bytes / bandwidth)
        result.append({"name": name, "time_s": seconds, "share": seconds / whole, "flops": flops, "bytes": size_bytes, "floor_s": floor})
    optimizer_s = measure_optimizer(masters, rows, repeats)
    step_s = whole * size.tokens_per_step / rows.numel() / usable_cores() + optimizer_s
    context = {
        "tokens": rows.numel(), "micro_batch_s": whole, "matmul_flops_per_s": rate, "copy_bytes_per_s": bandwidth,
        "optimizer_s": optimizer_s, "optimizer_share": optimizer_s / step_s, "tokens_per_step": size.tokens_per_step,
        "params": count_params(config)["total"], "matmul_share": sum(parts[name] for name in list(PARTS)[:3]) / whole,
    }  # fmt: skip
    return result, context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name, size in SIZES.items():
        rows, context = budget(size, options.repeats)
        path = write_record(
            f"step_budget_{name}", f"Where the time of a training step goes at {name}", rows, kernels=kernels.why_not() or "own", **context
        )
        for row in rows:
            print(f"{name}: {row['name']}: {1e3 * row['time_s']:.1f} ms ({row['share']:.0%}), floor {1e3 * row['floor_s']:.1f} ms")
        print(f"{name}: optimizer {1e3 * context['optimizer_s']:.1f} ms, {context['optimizer_share']:.1%} of a step; {path}")


if __name__ == "__main__":
    main()
