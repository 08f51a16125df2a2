"""How long until the validation loss of a character model of Shakespeare is 1.88 nats, and how low is it after three minutes?

    python benchmarks/shakespeare_char.py --data tinyshakespeare.txt [--contest three-minutes]

The peer is a plain eager PyTorch loop in fp32 with AdamW: for the time to 1.88 the well-known small CPU configuration (4 layers, 128
wide, context 64, batch 12, 2,000 steps), for three minutes the best configuration that we found for it. Ours is the project's own
model, step and optimizer. Both times are all of training, without validation. Both are validated on the whole last tenth, in fp32.
The two alternate.
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


def run_plain(train_data, val_data, vocab: int, seed: int, shape: dict) -> tuple[float, float]:
    """Return (seconds, validation loss) of the eager fp32 loop."""
    context, steps = shape["context"], shape["steps"]
    torch.manual_seed(seed)
    torch.set_num_threads(usable_cores())
    generator = torch.Generator().manual_seed(seed)
    model = PlainGPT(vocab, shape["layers"], shape["width"], shape["heads"], context)
    optimizer = build_adamw(model)
    started = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + cosine * 9e-4
        x, y = windows(train_data, shape["batch"], context, generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - started
    return seconds, validate(model.eval(), val_data, context)


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


CONTESTS = {
    "speed": (
        {"layers": 4, "width": 128, "heads": 4, "context": 64, "batch": 12, "steps": 2000},
        {"layers": 2, "width": 128, "context": 64, "rows": 64, "steps": 115, "lr": 0.006, "muon_lr": 0.05},
    ),
    "three-minutes": (
        {"layers": 4, "width": 128, "heads": 4, "context": 64, "batch": 12, "steps": 6000},
        {"layers": 4, "width": 256, "context": 128, "rows": 64, "steps": 800, "lr": 0.004, "muon_lr": 0.03},
    ),
}  # the plain loop's shape, then ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the text, one file")
    parser.add_argument("--contest", choices=CONTESTS, default="speed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--only", choices=("plain", "ours"), help="one side, for tuning; writes no record")
    for name in ("layers", "width", "context", "rows", "steps", "batch", "heads"):
        parser.add_argument(f"--{name}", type=int, help="of the side named by --only")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--muon-lr", type=float)
    options = parser.parse_args()
    named = {name: value for name, value in vars(options).items() if value is not None} if options.only else {}
    plain_shape, our_shape = ({**shape, **{k: v for k, v in named.items() if k in shape}} for shape in CONTESTS[options.contest])
    train_data, val_data, vocab = read_characters(options.data)
    plain, ours = [], []
    for seed in range(options.repeats):
        if options.only != "ours":
            plain.append(run_plain(train_data, val_data, vocab, seed, plain_shape))
            print(f"plain {plain[-1][0]:.1f} s, {plain[-1][1]:.4f} nats", flush=True)
        if options.only != "plain":
            ours.append(run_ours(train_data, val_data, vocab, seed, argparse.Namespace(**our_shape)))
            print(f"ours  {ours[-1][0]:.1f} s, {ours[-1][1]:.4f} nats", flush=True)
    if options.only:
        return
    ratio = spread([a[0] / b[0] for a, b in zip(plain, ours)])
    rows = [
        {"name": "plain eager fp32 loop", "time_s": spread([t for t, _ in plain]), "loss_nats": spread([loss for _, loss in plain])},
        {"name": "plinth", "time_s": spread([t for t, _ in ours]), "loss_nats": spread([loss for _, loss in ours])},
    ]
    name = "shakespeare_char" if options.contest == "speed" else "shakespeare_three_minutes"
    question = {"speed": "Seconds to a validation loss of 1.88 nats", "three-minutes": "Validation loss after three minutes"}
    path = write_record(name, f"{question[options.contest]} on Shakespeare's characters", rows,
                        ratio_plain_over_ours=ratio, plain=plain_shape, ours=our_shape)  # fmt: skip
    print(f"the plain loop takes {ratio['median']:.1f} times as long ({ratio['min']:.1f} to {ratio['max']:.1f}); {path}")


if __name__ == "__main__":
    main()
