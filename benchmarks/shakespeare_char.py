"""How long until the validation loss of a character model of Shakespeare is 1.88 nats, against a plain PyTorch loop?

    python benchmarks/shakespeare_char.py --data tinyshakespeare.txt

The peer is the well-known small CPU configuration (4 layers, 128 wide, context 64, batch 12, 2,000 steps, AdamW) in an
eager fp32 loop; its time is that of its 2,000 steps, without its validation. Ours is the project's own model, step and
optimizer; its time is all of training too. Both are validated on the whole last tenth, in fp32. The two alternate.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plain_gpt import PlainGPT, build_adamw
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.run import usable_cores
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import DTYPES, MasterWeights, fastest_dtype
from plinth.training.schedule import warmup_stable_decay
from plinth.training.step import open_workers, train_step
from record import spread, write_record


def read_characters(path: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return training and validation ids (the usual 90/10 split) and the number of characters."""
    text = path.read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    cut = int(0.9 * len(data))
    return data[:cut], data[cut:], len(ids)


def windows(data: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(data) - length - 1, (rows, 1), generator=generator)
    block = data[starts + torch.arange(length + 1)]
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


@torch.no_grad()
def validate(logits, data: torch.Tensor, length: int) -> float:
    """Return the mean loss in nats over the whole split, cut in rows of `length` characters."""
    rows = (len(data) - 1) // length
    inputs, targets = data[: rows * length].view(rows, length), data[1 : rows * length + 1].view(rows, length)
    total = sum(
        F.cross_entropy(logits(x).flatten(0, 1), y.flatten(), reduction="sum").item() for x, y in zip(inputs.split(256), targets.split(256))
    )
    return total / targets.numel()


def run_plain(train_data, val_data, vocab: int, seed: int, steps: int = 2000) -> tuple[float, float]:
    """Return (seconds, validation loss) of the eager fp32 loop."""
    torch.manual_seed(seed)
    torch.set_num_threads(usable_cores())
    generator = torch.Generator().manual_seed(seed)
    model = PlainGPT(vocab)
    optimizer = build_adamw(model)
    started = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + cosine * 9e-4
        x, y = windows(train_data, 12, 64, generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - started
    return seconds, validate(model.eval(), val_data, 64)


def run_ours(train_data, val_data, vocab: int, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return (seconds, validation loss) of the project's model and step."""
    generator = torch.Generator().manual_seed(seed)
    heads = options.width // 32
    config = DecoderConfig(
        vocab_size=-(-vocab // 32) * 32, hidden_size=options.width, num_layers=options.layers, num_heads=heads,
        num_kv_heads=heads, head_dim=32, intermediate_size=options.width * 8 // 3 // 32 * 32, max_seq_len=options.context,
    )  # fmt: skip
    started = time.perf_counter()
    masters = MasterWeights(Transformer(config).init_weights(generator), DTYPES[fastest_dtype()])
    optimizer = build_optimizer(masters, OptimizerConfig(lr=options.lr, muon_lr=options.muon_lr, weight_decay=0.1))
    threads = usable_cores()
    with open_workers(threads) as workers:
        for step in range(options.steps):
            x, y = windows(train_data, options.rows, options.context, generator)
            cut = -(-options.rows // threads)
            scale = warmup_stable_decay(step, steps=options.steps, warmup_steps=10, decay_steps=options.steps // 2)
            train_step(masters, causal_lm_loss, list(zip(x.split(cut), y.split(cut))), optimizer, workers, lr_scale=scale)
    seconds = time.perf_counter() - started
    model = masters.model.float()
    masters.publish()
    return seconds, validate(lambda x: model.logits(model(x)), val_data, options.context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the text, one file")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--only-ours", action="store_true", help="leave the peer out, for tuning")
    for name, value in {"layers": 2, "width": 128, "context": 64, "rows": 64, "steps": 115, "lr": 0.006, "muon_lr": 0.05}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    train_data, val_data, vocab = read_characters(options.data)
    plain, ours = [], []
    for seed in range(options.repeats):
        if not options.only_ours:
            plain.append(run_plain(train_data, val_data, vocab, seed))
            print(f"plain {plain[-1][0]:.1f} s, {plain[-1][1]:.4f} nats", flush=True)
        ours.append(run_ours(train_data, val_data, vocab, seed, options))
        print(f"ours  {ours[-1][0]:.1f} s, {ours[-1][1]:.4f} nats", flush=True)
    if options.only_ours:
        return
    ratio = spread([a[0] / b[0] for a, b in zip(plain, ours)])
    rows = [
        {"name": "plain eager fp32 loop", "time_s": spread([t for t, _ in plain]), "loss_nats": spread([loss for _, loss in plain])},
        {"name": "plinth", "time_s": spread([t for t, _ in ours]), "loss_nats": spread([loss for _, loss in ours])},
    ]
    shape = {name: getattr(options, name) for name in ("layers", "width", "context", "rows", "steps", "lr", "muon_lr")}
    path = write_record("shakespeare_char", "Seconds to a validation loss of 1.88 nats on Shakespeare's characters", rows,
                        ratio_plain_over_ours=ratio, ours=shape)  # fmt: skip
    print(f"the plain loop takes {ratio['median']:.1f} times as long ({ratio['min']:.1f} to {ratio['max']:.1f}); {path}")


if __name__ == "__main__":
    main()
