"""What does a base of 4 bits save in memory, and what does it cost in time, when adapters are trained on it?

    python benchmarks/qlora_memory.py [--layers 12] [--width 768] [--steps 3]

All weights, LoRA and QLoRA train the same decoder in bf16 on the same batch, each in a process of its own. Tensors are counted: what the
model, the fp32 masters and the optimizer hold. Resident memory is read from the system after the last update, with the interpreter, PyTorch
and the activations in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from record import write_record

KINDS = {"all weights": None, "LoRA": {"rank": 16}, "QLoRA": {"rank": 16, "quantise": "nf4"}}
ROWS, LENGTH = 4, 256


def train(kind: str, layers: int, width: int, steps: int) -> dict[str, float]:
    """Train and measure, in this process."""
    import torch

    from plinth.models.config import DecoderConfig
    from plinth.models.transformer import Transformer
    from plinth.posttraining.lora import LoraConfig, add_adapters
    from plinth.training.objectives import causal_lm_loss
    from plinth.training.optim import OptimizerConfig, build_optimizer
    from plinth.training.precision import MasterWeights
    from plinth.training.step import open_workers, train_step

    shape = DecoderConfig(
        vocab_size=4096, hidden_size=width, num_layers=layers, num_heads=width // 64, num_kv_heads=width // 64, head_dim=64,
        intermediate_size=4 * width, max_seq_len=LENGTH,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = Transformer(shape).init_weights(generator)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    if KINDS[kind] is not None:
        add_adapters(model, LoraConfig(**KINDS[kind]))
    masters = MasterWeights(model, torch.bfloat16)
    optimizer = build_optimizer(masters, OptimizerConfig(name="adamw"))
    tokens = torch.randint(0, shape.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    times = []
    with open_workers(1, "cpu") as workers:
        for _ in range(steps + 1):
            started = time.perf_counter()
            train_step(masters, causal_lm_loss, [(tokens[:, :-1], tokens[:, 1:])], optimizer, workers, lr_scale=1e-3)
            times.append(time.perf_counter() - started)
    frozen = [whole for _, whole in masters._frozen]
    groups = {
        "model": [*model.parameters(), *model.buffers()],
        "masters": [*masters.tensors.values(), *frozen],
        "optimizer": list(optimizer.state.values()),
    }
    held = {f"{name}_bytes": sum(t.numel() * t.element_size() for t in tensors) for name, tensors in groups.items()}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"num_params": num_params, **held, "resident_bytes": pages * 4096, "step_s": min(times[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=3, help="updates that are timed, after one that is not; the fastest counts")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = ["--layers", str(options.layers), "--width", str(options.width), "--steps", str(options.steps)]
    if options.kind:
        print(json.dumps(train(options.kind, options.layers, options.width, options.steps)))
        return
    rows = []
    for kind in KINDS:
        done = subprocess.run([sys.executable, __file__, "--kind", kind, *size], check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"name": kind, **json.loads(done.stdout.splitlines()[-1])})
    question = "What does a base of 4 bits save in memory, and what does it cost in time, when adapters are trained on it?"
    print(write_record("qlora_memory", question, rows, layers=options.layers, width=options.width, tokens_per_step=ROWS * LENGTH))


if __name__ == "__main__":
    main()
