"""How fast is the decoder beside transformers' own, forward and in a training step, on the same shapes and weights?

Both read the same folder: 6 layers x 512, 8 heads of 64 with 4 key heads, vocabulary 4,096; 4 rows of 256 tokens a step. Forward is the
scores of all positions. A training step is loss, backward, clipping to norm 1 and AdamW: ours is the project's step with fp32 masters,
theirs in fp32 (the default), in bf16 (weights and optimizer state in bf16, its fastest) and in fp32 under bf16 autocast (what its Trainer
does with bf16=True). Sides alternate within a round; ratios are of medians, by the clock and by the processor's time, which other load
on the machine changes less (with --threads 1: waiting threads count there too).

    python benchmarks/decoder_speed.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, save_model
from plinth.models.transformer import Transformer
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers, train_step
from record import spread, write_record

DEFAULT = DecoderConfig(hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=64, intermediate_size=1408, max_seq_len=256)
SHAPES = {"qwen3 (the default decoder)": DEFAULT, "llama": replace(DEFAULT, qk_norm=False, learnable_norm=True)}
ROWS, LENGTH = 4, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[], None]


def our_sides(folder: Path, x: torch.Tensor, y: torch.Tensor, workers, threads: int) -> dict[str, Run]:
    """Return what runs ours once, forward and a step, in both types."""
    sides: dict[str, Run] = {}
    for name, dtype in DTYPES.items():
        model = load_decoder(folder, dtype)
        masters = MasterWeights(load_decoder(folder), dtype)
        optimizer = build_optimizer(masters, OptimizerConfig(name="adamw"))
        batches = list(zip(x.split(ROWS // threads), y.split(ROWS // threads)))
        sides[f"forward, Plinth {name}"] = no_grad(lambda model=model: model.logits(model(x)))
        sides[f"step, Plinth {name}"] = lambda m=masters, o=optimizer, b=batches: train_step(m, causal_lm_loss, b, o, workers)
    return sides


def their_sides(folder: Path, x: torch.Tensor, y: torch.Tensor) -> dict[str, Run]:
    """Return what runs transformers' model once, forward and a step, in the types and ways that it has."""
    sides: dict[str, Run] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("bf16 autocast", torch.float32)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        cast = lambda name=name: torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("autocast"))  # noqa: E731

        def forward(model=model, cast=cast) -> None:
            with cast():
                model(x, use_cache=False)

        def step(model=model, optimizer=optimizer, cast=cast) -> None:
            with cast():
                logits = model(x, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        sides[f"forward, transformers {name}"], sides[f"step, transformers {name}"] = no_grad(forward), step
    return sides


def no_grad(run: Run) -> Run:
    return torch.no_grad()(run)


Times = dict[str, list[tuple[float, float]]]
"""side → (seconds, the processor's seconds) of each round"""


def measure(sides: dict[str, Run], kind: str, rounds: int, threads: int) -> Times:
    """Time each side of a kind once a round; the first round, which warms up, is not kept."""
    times: Times = {name: [] for name in sides if name.startswith(kind)}
    for number in range(rounds + 1):
        for name in times:
            torch.set_num_threads(1 if kind == "step" and "Plinth" in name else threads)
            started, busy = time.perf_counter(), time.process_time()
            sides[name]()
            if number:
                times[name].append((time.perf_counter() - started, time.process_time() - busy))
    return times


def rows_of(shape: str, times: Times) -> list[dict]:
    """Return a row a side: seconds, tokens a second, and how many times faster than each of theirs ours is."""
    rows = []
    for name, values in times.items():
        kind, side = name.split(", ")
        clocks = {"seconds": spread([wall for wall, _ in values]), "cpu_seconds": spread([busy for _, busy in values])}
        row = {"shape": shape, "work": kind, "side": side, **clocks, "tokens_per_s": ROWS * LENGTH / clocks["seconds"]["median"]}
        for i, clock in enumerate(clocks if "Plinth" in name else ()):
            peers = {other: statistics.median(both[i] for both in times[other]) for other in times if "transformers" in other}
            row[f"faster_by_{clock}"] = {other.split(", ")[1]: median / clocks[clock]["median"] for other, median in peers.items()}
        rows.append(row)
        ratios = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in row.get("faster_by_cpu_seconds", {}).items())
        both = " ".join(f"{clock['median'] * 1e3:7.0f} ms" for clock in clocks.values())
        print(f"{shape:28} {kind:8} {side:26} {both} {row['tokens_per_s']:8.0f} tokens/s  by cpu {ratios}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that each side runs, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every side (default: as many as cores)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    threads, rows = options.threads, []
    tokens = torch.randint(DEFAULT.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for shape, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch, open_workers(threads) as workers:
            save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), None, Path(scratch) / "model")
            sides = our_sides(Path(scratch) / "model", x, y, workers, threads) | their_sides(Path(scratch) / "model", x, y)
            for kind in ("forward", "step"):
                rows += rows_of(shape, measure(sides, kind, options.rounds, threads))
    question = (
        "Tokens a second of a decoder of 6 layers x 512, forward and in a training step, beside transformers' model of the same folder."
    )
    write_record("decoder_speed", question, rows, threads=threads, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
