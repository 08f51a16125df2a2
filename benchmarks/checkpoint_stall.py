"""How long does training stand still for a checkpoint, when it waits for the disk and when a thread writes behind it?

    python benchmarks/checkpoint_stall.py

A decoder of about 20 M parameters trains on random tokens with the project's own loop. `waiting` writes each checkpoint before the next
step begins; `background` copies the state in memory and goes on. Both take the same checkpoints at the same steps, alternating rounds.
The stall of a checkpoint is the time between the end of its step and the beginning of the next; `slower_steps` compares the steps
during which the thread writes with the others, for what the writing costs beside them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from plinth.models.config import DecoderConfig
from plinth.models.cost import count_params
from plinth.models.transformer import Transformer
from plinth.run import Run, usable_cores
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss
from plinth.training.precision import fastest_dtype
from record import spread, write_record

MODEL = DecoderConfig(vocab_size=4096, hidden_size=384, num_layers=10, num_heads=6, num_kv_heads=6, head_dim=64, intermediate_size=1024)
ROWS, SEQ_LEN = 2, 128


def run_training(folder: Path, background: bool, steps: int, every: int) -> dict[str, list[float]]:
    """Train and return seconds: between steps with a checkpoint, between the others, and of the steps while one was being written."""
    tokens = torch.randint(MODEL.vocab_size, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    asked, seconds = [], {"stall": [], "plain": [], "step_writing": [], "step": []}

    def batches_at(step: int):
        asked.append(time.perf_counter())
        writing = list((folder / "checkpoints").glob(".step_*"))
        if len(ends) == step and step:
            seconds["stall" if step % every == 0 else "plain"].append(asked[-1] - ends[-1])
        began.append((time.perf_counter(), bool(writing)))
        return [(row[None, :-1], row[None, 1:]) for row in tokens]

    began: list[tuple[float, bool]] = []
    ends: list[float] = []

    def data_metrics(steps_done: int) -> dict[str, float]:  # called when a step's update is made, before its checkpoint
        ends.append(time.perf_counter())
        start, writing = began[-1]
        seconds["step_writing" if writing else "step"].append(ends[-1] - start)
        return {}

    model = Transformer(MODEL).init_weights(torch.Generator().manual_seed(0))
    config = TrainConfig(
        steps=steps, warmup_steps=2, dtype=fastest_dtype(), num_threads=usable_cores(), checkpoint_every_s=1e9, keep_every_steps=every,
        keep_pre_decay=False, background_saves=background,
    )  # fmt: skip
    train(Run.create(folder, "pretrain", {}), model, causal_lm_loss, batches_at, config, description="stall", data_metrics=data_metrics)
    seconds["step"] = seconds["step"][1:]  # the first one touches memory for the first time
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6, help="steps from checkpoint to checkpoint")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {"waiting": {}, "background": {}}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds):
            for name in found:
                seconds = run_training(Path(folder) / f"{name}{i}", name == "background", options.steps, options.every)
                for key, values in seconds.items():
                    found[name].setdefault(key, []).extend(values)
                size = sum(file.stat().st_size for file in (Path(folder) / f"{name}{i}").rglob("state.safetensors"))
                print(name, {key: round(statistics.median(values), 4) for key, values in seconds.items() if values}, flush=True)
    rows = [{"name": name, **{f"{key}_s": spread(values) for key, values in by_key.items() if values}} for name, by_key in found.items()]
    checkpoints = (options.steps - 1) // options.every + (options.steps % options.every == 0)
    write_record(
        "checkpoint_stall", __doc__.splitlines()[0], rows,
        num_params=count_params(MODEL)["total"], checkpoint_bytes=size // checkpoints,
        stall_waiting_over_background=found_ratio(found), rounds=options.rounds,
    )  # fmt: skip


def found_ratio(found: dict[str, dict[str, list[float]]]) -> float:
    return statistics.median(found["waiting"]["stall"]) / statistics.median(found["background"]["stall"])


if __name__ == "__main__":
    main()
