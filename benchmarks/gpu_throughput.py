"""What share of a GPU's matrix rate does pretraining use, and how many tokens a second against a plain compiled PyTorch GPT?

    python benchmarks/gpu_throughput.py [--sizes 124M 1B] [--rounds 3] [--profile FOLDER]
    python benchmarks/gpu_throughput.py --device cpu --sizes tiny --records FOLDER        (does the script work?)

Random tokens. Every side first runs a few steps at each micro-batch size and keeps the fastest that fits; then the sides alternate,
and a round's figure is the median step. MFU counts forward and backward of the matrices, the head and causal attention, nothing
recomputed; it is given against the rate of a large bf16 product measured in the same run, and against the vendor's data sheet.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from gpu_sides import Ours, Plain, Rows, Shape, Side
from plinth.models.cost import count_params, train_flops_per_token
from plinth.ops.roofline import copy_bandwidth, matmul_rate
from plinth.training.device import choose_device, peak_memory_bytes, synchronize
from plinth.training.optim import OptimizerConfig
from record import RECORDS, spread, write_record

DATASHEET_BF16 = {  # dense FLOP/s; first name that the GPU's name contains
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    shape: Shape
    tokens_per_step: int
    micro_batch_sizes: tuple[int, ...]
    sides: tuple[str, ...]
    dtype: str = "bfloat16"


SIDES: dict[str, Callable[[Shape, str, str], Side]] = {
    "plinth, Muon, compiled": lambda *at: Ours(*at, optimizer=OptimizerConfig(), compiled=True),
    "plinth, Muon, compiled, CUDA graphs": lambda *at: Ours(*at, optimizer=OptimizerConfig(), compiled=True, graphs=True),
    "plinth, AdamW, compiled": lambda *at: Ours(*at, optimizer=OptimizerConfig(name="adamw", lr=6e-4), compiled=True),
    "plinth, Muon, eager": lambda *at: Ours(*at, optimizer=OptimizerConfig(), compiled=False),
    "plain PyTorch GPT, AdamW, compiled": lambda *at: Plain(*at, compiled=True),
    "plain PyTorch GPT, AdamW, eager": lambda *at: Plain(*at, compiled=False),
}
EAGER = ("plinth, Muon, eager", "plain PyTorch GPT, AdamW, eager")
LARGE = ("plinth, Muon, compiled", "plinth, AdamW, compiled", "plain PyTorch GPT, AdamW, compiled")
SIZES = {
    "124M": Size(Shape(12, 768, 12, 1024, 50_304), 512 * 1024, (16, 32, 64), tuple(SIDES)),
    "1B": Size(Shape(24, 1792, 14, 2048, 50_304), 64 * 2048, (2, 4, 8), LARGE),
    "tiny": Size(Shape(2, 32, 2, 16, 64), 8 * 16, (2, 4), EAGER, "float32"),
}


def datasheet_rate(device: str) -> float | None:
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in DATASHEET_BF16.items() if part in name), None)


def make_rows(size: Size, micro_batch_size: int, seed: int) -> list[Rows]:
    shape, generator = size.shape, torch.Generator().manual_seed(seed)
    rows = torch.randint(shape.vocab, (size.tokens_per_step // shape.context, shape.context + 1), generator=generator)
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(micro_batch_size)]


def time_steps(side: Side, size: Size, micro_batch_size: int, steps: int, device: str, seed: int = 0) -> float:
    """Return the median seconds of a step; the host's part, moving the tokens included, counts."""
    times = []
    for step in range(steps):
        batches = make_rows(size, micro_batch_size, seed * 1000 + step)
        synchronize(device)
        started = time.perf_counter()
        side.step(batches)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def release(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def fastest_micro_batch(name: str, size: Size, device: str) -> dict[str, Any]:
    """Return {micro_batch_size, step_s, warm_up_s, peak_memory_bytes} of the fastest micro-batch size that fits."""
    found: list[dict[str, Any]] = []
    for micro_batch_size in size.micro_batch_sizes:
        release(device)
        side = None
        try:
            side = SIDES[name](size.shape, device, size.dtype)
            started = time.perf_counter()
            small = replace(size, tokens_per_step=2 * micro_batch_size * size.shape.context)
            time_steps(side, small, micro_batch_size, 2, device)
            warm_up_s = time.perf_counter() - started
            step_s = time_steps(side, size, micro_batch_size, 1, device)
            found.append({"micro_batch_size": micro_batch_size, "step_s": step_s, "warm_up_s": warm_up_s,
                          "peak_memory_bytes": peak_memory_bytes(device)})  # fmt: skip
            print(f"  {name}, micro-batch {micro_batch_size}: {step_s:.3f} s a step, first steps {warm_up_s:.1f} s", flush=True)
        except torch.OutOfMemoryError:
            print(f"  {name}, micro-batch {micro_batch_size}: out of memory", flush=True)
        finally:
            if side is not None:
                side.close()
            del side
    return min(found, key=lambda row: row["step_s"])


def compare(size_name: str, device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    size = SIZES[size_name]
    torch._dynamo.reset()
    torch._dynamo.config.automatic_dynamic_shapes = False  # each micro-batch size is compiled for itself, on every side
    chosen = {name: fastest_micro_batch(name, size, device) for name in size.sides}
    measured: dict[str, list[float]] = {name: [] for name in size.sides}
    for number, name in itertools.product(range(options.rounds), size.sides):
        release(device)
        side = SIDES[name](size.shape, device, size.dtype)
        time_steps(side, size, chosen[name]["micro_batch_size"], 1, device)  # compiled code is there; memory is not
        step_s = time_steps(side, size, chosen[name]["micro_batch_size"], options.steps, device, seed=number + 1)
        measured[name].append(size.tokens_per_step / step_s)
        side.close()
        del side
        print(f"{size_name}, round {number + 1}: {name}: {measured[name][-1]:,.0f} tokens/s", flush=True)
    return [row(size_name, name, measured, chosen[name], device, options) for name in size.sides]


def row(size_name: str, name: str, measured: dict, chosen: dict, device: str, options: argparse.Namespace) -> dict[str, Any]:
    size = SIZES[size_name]
    flops = train_flops_per_token(size.shape.config(), size.shape.context)
    tokens_per_s, sheet = spread(measured[name]), datasheet_rate(device)
    ours = measured[size.sides[0]]
    return {
        "size": size_name, "name": name, "tokens_per_s": tokens_per_s, "params": count_params(size.shape.config())["total"],
        "tokens_per_step": size.tokens_per_step, "micro_batch_size": chosen["micro_batch_size"], "warm_up_s": chosen["warm_up_s"],
        "peak_memory_bytes": chosen["peak_memory_bytes"], "flops_per_token": flops,
        "mfu": tokens_per_s["median"] * flops / options.matmul_rate,
        "mfu_datasheet": tokens_per_s["median"] * flops / sheet if sheet else None,
        "first_over_this": spread([a / b for a, b in zip(ours, measured[name])]),
    }  # fmt: skip


def profile(size_name: str, name: str, device: str, folder: Path) -> None:
    """Write the table of a step's operations by time on the device."""
    size = SIZES[size_name]
    side = SIDES[name](size.shape, device, size.dtype)
    small = replace(size, tokens_per_step=2 * size.micro_batch_sizes[-1] * size.shape.context)
    time_steps(side, small, size.micro_batch_sizes[-1], 2, device)
    batches = make_rows(small, size.micro_batch_sizes[-1], seed=1)
    with torch.profiler.profile() as profiler:
        side.step(batches)
        synchronize(device)
    order = "self_device_time_total" if torch.device(device).type == "cuda" else "self_cpu_time_total"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"profile_{size_name}_{name.replace(', ', '_').replace(' ', '_')}.txt"
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=50))
    side.close()


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the GPU")
    parser.add_argument("--sizes", nargs="+", default=["124M", "1B"], choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps a round of each side")
    parser.add_argument("--profile", type=Path, help="folder for a table of each size's first side, operation by operation")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the record")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    dtype = SIZES[options.sizes[0]].dtype
    options.matmul_rate = matmul_rate(dtype, device=device)
    print(f"{device}: {options.matmul_rate / 1e12:.1f} TFLOP/s in a large {dtype} product", flush=True)
    rows = [row for size_name in options.sizes for row in compare(size_name, device, options)]
    for size_name in options.sizes if options.profile else ():
        profile(size_name, SIZES[size_name].sides[0], device, options.profile)
    bandwidth = copy_bandwidth(1 << (27 if device == "cpu" else 30), device=device)
    question = "MFU and tokens a second of pretraining on one device, against a plain compiled PyTorch GPT"
    path = write_record("gpu_throughput", question, rows, options.records, device=device, matmul_flops_per_s=options.matmul_rate,
                        datasheet_flops_per_s=datasheet_rate(device), copy_bytes_per_s=bandwidth)  # fmt: skip
    for each in rows:
        speed, ratio = each["tokens_per_s"]["median"], each["first_over_this"]["median"]
        print(f"{each['size']}  {each['name']:<40} {speed:>12,.0f} tokens/s  MFU {each['mfu']:.1%}  {ratio:.2f}x")
    print(path)
    return path


if __name__ == "__main__":
    main()
