"""How long until a validation loss on real text, against a plain compiled PyTorch GPT with tuned AdamW of the same size?

    python benchmarks/gpu_time_to_loss.py [--text FOLDER ...] [--steps 2000]
    python benchmarks/gpu_time_to_loss.py --device cpu --size tiny --steps 12 --limit-bytes 300000 --records FOLDER   (does it work?)

The text is by default the Python code of the standard library and of the installed packages, every 50th file held out; a
byte-level BPE is trained on a part of it. The plain GPT (bf16 autocast, compiled, fused AdamW, cosine schedule) trains for --steps
with each of --plain-lrs; the best of them sets the loss to reach. Ours (Muon, warm-up, constant, 1 - sqrt) trains for growing shares
of as many steps, each a run of its own with its whole schedule, until the median over the seeds reaches that loss. Both see batches
of the same size, drawn alike. Time is training alone: compiling, which is given beside it, and validating are left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpu_sides import Ours, Plain, Rows, Shape, Side
from plinth.models.cost import count_params
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.device import choose_device, synchronize
from plinth.training.optim import OptimizerConfig
from plinth.training.schedule import warmup_stable_decay
from record import RECORDS, spread, write_record

HELD_OUT = 50
TOKENIZER_BYTES = 8_000_000
VALIDATION_ROWS = 256


@dataclass(frozen=True)
class Size:
    shape: Shape
    rows_per_step: int
    micro_batch_size: int
    dtype: str = "bfloat16"


SIZES = {
    "12x768": Size(Shape(12, 768, 12, 1024, 16_384), 128, 32),
    "6x512": Size(Shape(6, 512, 8, 512, 8_192), 256, 128),
    "tiny": Size(Shape(2, 64, 2, 32, 512), 16, 8, "float32"),
}


def default_text() -> list[Path]:
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def read_files(folders: Sequence[Path], limit_bytes: int) -> Iterator[str]:
    """Yield the texts of .py, .md, .rst and .txt files, a folder at a time, until the limit; one in another encoding is left out."""
    left = limit_bytes
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".md", ".rst", ".txt"}):
        if left <= 0:
            return
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        left -= len(text)
        yield text


def prepare(folders: Sequence[Path], limit_bytes: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return training and validation tokens, int32, and the bytes of a validation token."""
    texts = list(read_files(folders, limit_bytes))
    held_out, kept = texts[::HELD_OUT], [text for i, text in enumerate(texts) if i % HELD_OUT]
    stride = max(1, sum(map(len, kept)) // TOKENIZER_BYTES)
    tokenizer = train_tokenizer(kept[::stride], vocab_size)
    train, validation = encode(tokenizer, kept), encode(tokenizer, held_out)
    return train, validation, sum(len(text.encode()) for text in held_out) / len(validation)


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Return the texts' tokens one after another, each text closed by the end-of-text token."""
    end = tokenizer.end_of_text_id
    return torch.cat([torch.tensor([*ids, end], dtype=torch.int32) for ids in tokenizer.encode_batch(texts)])


def draw_rows(data: torch.Tensor, size: Size, generator: torch.Generator) -> list[Rows]:
    context = size.shape.context
    starts = torch.randint(len(data) - context - 1, (size.rows_per_step, 1), generator=generator)
    block = data[starts + torch.arange(context + 1)].long()
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in block.split(size.micro_batch_size)]


@torch.no_grad()
def validate(side: Side, data: torch.Tensor, size: Size, device: str) -> float:
    """Return the mean loss in nats over the first VALIDATION_ROWS rows of the held-out text."""
    context, total, count = size.shape.context, 0.0, 0
    num_rows = min(VALIDATION_ROWS, (len(data) - 1) // context)
    block = torch.stack([data[i * context : (i + 1) * context + 1] for i in range(num_rows)]).long()
    for rows in block.split(min(8, size.micro_batch_size)):
        rows = rows.to(device)
        logits = side.logits(rows[:, :-1]).flatten(0, 1).float()
        total += float(F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
        count += rows[:, 1:].numel()
    return total / count


def cosine(step: int, steps: int) -> float:
    """Rise over a twentieth of the steps, fall as half a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def stable(step: int, steps: int) -> float:
    return warmup_stable_decay(step, steps=steps, warmup_steps=max(1, steps // 50), decay_steps=round(0.4 * steps))


def run(make: Callable[[], Side], schedule: Callable[[int, int], float], steps: int, data, size: Size, device: str, seed: int) -> dict:
    """Train once and return {steps, seed, time_s, loss_nats}."""
    side, generator = make(), torch.Generator().manual_seed(1000 + seed)
    train, validation = data
    synchronize(device)
    started = time.perf_counter()
    for step in range(steps):
        side.step(draw_rows(train, size, generator), schedule(step, steps))
    synchronize(device)
    seconds = time.perf_counter() - started
    loss = validate(side, validation, size, device)
    side.close()
    return {"steps": steps, "seed": seed, "time_s": seconds, "loss_nats": loss}


def warm_up(make: Callable[[], Side], data, size: Size, device: str) -> float:
    """Let everything be compiled, by two steps of a model that is thrown away; return the seconds."""
    started = time.perf_counter()
    run(make, lambda step, steps: 0.0, 2, data, size, device, seed=0)
    return time.perf_counter() - started


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(each[key] for each in runs)


def show(name: str, runs: Sequence[dict[str, Any]]) -> None:
    print(f"{name}: {median(runs, 'loss_nats'):.4f} nats after {median(runs, 'time_s'):.1f} s", flush=True)


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the GPU")
    parser.add_argument("--size", choices=list(SIZES), default="12x768")
    parser.add_argument("--steps", type=int, default=600, help="steps of the plain GPT; ours takes shares of them")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plain-lrs", type=float, nargs="+", default=[6e-4, 1.2e-3, 2.4e-3])
    parser.add_argument("--lr", type=float, default=OptimizerConfig.lr, help="our peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=OptimizerConfig.muon_lr, help="our peak rate of Muon")
    parser.add_argument("--text", type=Path, nargs="+", default=default_text(), help="folders of text files")
    parser.add_argument("--limit-bytes", type=int, default=100_000_000, help="characters read at most")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the record")
    options = parser.parse_args(argv)
    device, size = choose_device(options.device), SIZES[options.size]
    compiled = device != "cpu"
    train, validation, token_bytes = prepare(options.text, options.limit_bytes, size.shape.vocab)
    data = train, validation
    print(f"{len(train):,} tokens to train on, {len(validation):,} held out", flush=True)
    muon = OptimizerConfig(lr=options.lr, muon_lr=options.muon_lr)

    def plain_at(lr: float, seed: int) -> Callable[[], Side]:
        return lambda: Plain(size.shape, device, size.dtype, compiled=compiled, lr=lr, seed=seed)

    def ours_at(seed: int) -> Callable[[], Side]:
        return lambda: Ours(size.shape, device, size.dtype, optimizer=muon, compiled=compiled, seed=seed)

    compile_s = {"plain": warm_up(plain_at(1e-3, 0), data, size, device), "plinth": warm_up(ours_at(0), data, size, device)}
    by_lr = {lr: run(plain_at(lr, 0), cosine, options.steps, data, size, device, 0) for lr in options.plain_lrs}
    best_lr = min(by_lr, key=lambda lr: by_lr[lr]["loss_nats"])
    plain = [by_lr[best_lr]]
    plain += [run(plain_at(best_lr, seed), cosine, options.steps, data, size, device, seed) for seed in range(1, options.seeds)]
    target = median(plain, "loss_nats")
    show(f"plain, lr {best_lr:g}", plain)
    ours: list[dict[str, Any]] = []
    shorter: list[dict[str, Any]] = []
    for share in options.shares:
        shorter += ours
        steps = max(2, round(share * options.steps))
        ours = [run(ours_at(seed), stable, steps, data, size, device, seed) for seed in range(options.seeds)]
        show(f"plinth, {steps} steps", ours)
        if median(ours, "loss_nats") <= target:
            break
    way = "compiled" if compiled else "eager"
    rows = [
        {"name": f"plain PyTorch GPT, AdamW, {way}", "lr": best_lr, "compile_s": compile_s["plain"], "runs": plain,
         "tried": [{"lr": lr, **each} for lr, each in by_lr.items()]},
        {"name": f"plinth, Muon, {way}", "lr": muon.lr, "muon_lr": muon.muon_lr, "compile_s": compile_s["plinth"], "runs": ours,
         "tried": shorter},
    ]  # fmt: skip
    for each in rows:
        each["time_s"], each["loss_nats"] = (spread([one[key] for one in each["runs"]]) for key in ("time_s", "loss_nats"))
    reached = median(ours, "loss_nats") <= target
    ratio = spread([a["time_s"] / b["time_s"] for a, b in zip(plain, ours)])
    path = write_record(
        "gpu_time_to_loss", "Seconds of training to a validation loss on Python code, against a plain compiled PyTorch GPT", rows,
        options.records, device=device, size=options.size, params=count_params(size.shape.config())["total"], loss_nats_to_reach=target,
        reached=reached, ratio_plain_over_ours=ratio if reached else None, train_tokens=len(train), bytes_a_token=token_bytes,
    )  # fmt: skip
    print(f"{'reached' if reached else 'NOT reached'}; the plain GPT takes {ratio['median']:.2f} times as long; {path}")
    return path


if __name__ == "__main__":
    main()
