"""Which options give a lower loss after equal time? Every arm at two sizes, several seeds, the same text.

    python benchmarks/ablations/league.py prepare --data DIR                 # text, tokenizer, shards: the standard library of this Python
    python benchmarks/ablations/league.py time --data DIR                    # seconds a step of every arm
    python benchmarks/ablations/league.py run --data DIR --size 1M --arms muon adamw --seeds 0 1 2 3 4
    python benchmarks/ablations/league.py report --data DIR                  # the record and the table of docs/ablations.md

Equal time, on a machine that others use too: `time` measures the step of every arm on one core, in processor time (which is wall
clock where nobody else computes), in alternation with the default's. The default trains for a fixed number of updates; another arm
gets as many as fit in the time that these take. So an arm that costs more a step gets fewer of them, with its schedule stretched to end
there, and the runs themselves may take as long as they like. All runs of a seed have the same first weights and read the text in the
same order. The score is the loss in nats a token on the whole held-out split, in fp32. Runs that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ablations.arms import ARMS, BASELINE, SIZES, SWEEPS, Arm  # noqa: E402
from plinth.data.loader import TokenLoader  # noqa: E402
from plinth.data.shards import open_split  # noqa: E402
from plinth.models.config import DecoderConfig  # noqa: E402
from plinth.models.cost import count_params  # noqa: E402
from plinth.models.transformer import Transformer  # noqa: E402
from plinth.training.objectives import causal_lm_loss  # noqa: E402
from plinth.training.optim import OptimizerConfig, build_optimizer  # noqa: E402
from plinth.training.precision import DTYPES, MasterWeights, fastest_dtype  # noqa: E402
from plinth.training.schedule import BatchSchedule, Stage, warmup_stable_decay  # noqa: E402
from plinth.training.step import open_workers, train_step  # noqa: E402

TIMED_STEPS, TIMED_ROUNDS = 2, 5


class Run:
    """One arm at one size with one seed: model, optimizer, batches."""

    def __init__(self, shards: Path, size: str, arm: Arm, seed: int, steps: int):
        self.size, self.arm, self.steps = SIZES[size], arm, steps
        shape = {"vocab_size": self.size.vocab_size, "max_seq_len": self.size.seq_len} | self.size.model | arm.model_fields(size)
        self.config = DecoderConfig(**shape)
        name = arm.optimizer.get("name", "muon")
        options = {"name": name} | self.size.rates[name] | arm.optimizer
        model = Transformer(self.config).init_weights(torch.Generator().manual_seed(seed))
        self.masters = MasterWeights(model, DTYPES[fastest_dtype()])
        self.optimizer = build_optimizer(self.masters, OptimizerConfig(**options))
        self.schedule = BatchSchedule(stages(self.size, arm), steps)
        self.loader = TokenLoader(shards, self.size.seq_len, self.size.sequences, seed)

    def step(self, step: int, workers) -> float:
        """Do one update; return its training loss."""
        first, count, seq_len = self.schedule.rows(step)
        decay_steps = round(self.steps * self.arm.decay_fraction)
        scale = warmup_stable_decay(step, steps=self.steps, warmup_steps=self.arm.warmup_steps, decay_steps=decay_steps)
        batch = self.loader.rows(first, count, seq_len)
        micro = max(1, 4096 // seq_len)
        batches = list(zip(*(tensor.split(micro) for tensor in batch)))
        return train_step(self.masters, causal_lm_loss, batches, self.optimizer, workers, lr_scale=scale).loss_nats


def stages(size, arm: Arm) -> list[Stage]:
    shapes = arm.stages or ((1.0, 1.0, arm.sequences),)
    return [Stage(share, int(size.seq_len * length), int(size.sequences * count)) for share, length, count in shapes]


def all_arms(size: str) -> dict[str, Arm]:
    return ARMS | SWEEPS[size]


def timing_key(size: str, arm: Arm) -> str:
    """Name what decides the time of a step: all of an arm but its rates."""
    free = ("lr", "muon_lr", "weight_decay", "beta2", "momentum_warmup_steps")
    optimizer = {name: value for name, value in arm.optimizer.items() if name not in free}
    return json.dumps([size, arm.model_fields(size), optimizer, arm.sequences, arm.stages])


def time_arm(shards: Path, size: str, arm: Arm) -> dict[str, list[float]]:
    """Return seconds a step of each stage over the default's seconds a step, and these; rounds alternate, the least counts."""
    ratios, seconds = [], []
    with open_workers(1) as workers:
        default, run = (Run(shards, size, each, 0, 8 * TIMED_STEPS) for each in (ARMS[BASELINE], arm))
        time_stage(default, 0, workers, steps=1)
        for index in range(len(run.schedule.stages)):
            time_stage(run, index, workers, steps=1)
            own, other = zip(*[(time_stage(run, index, workers), time_stage(default, 0, workers)) for _ in range(TIMED_ROUNDS)])
            ratios.append(1.0 if arm == ARMS[BASELINE] else min(own) / min(other))
            seconds.append(min(other))
    return {"ratios": ratios, "default_step_s": seconds}


def time_stage(run: Run, index: int, workers, steps: int = TIMED_STEPS) -> float:
    """Return the smallest processor seconds of a step among some steps of a stage."""
    start = run.schedule.ends[index - 1] if index else 0
    times = []
    for step in range(steps):
        began = time.process_time()
        run.step(start + step % (run.schedule.ends[index] - start), workers)
        times.append(time.process_time() - began)
    return min(times)


def steps_within(size: str, arm: Arm, ratios: list[float]) -> int:
    """Return how many updates of an arm take as long as the default's; `ratios` are the costs of a step in each of its stages."""
    updates = [stage.share / stage.tokens_per_step for stage in stages(SIZES[size], arm)]
    mean = sum(n * ratio for n, ratio in zip(updates, ratios)) / sum(updates)
    return max(len(updates), int(SIZES[size].steps / mean))


@torch.no_grad()
def heldout_loss(model: Transformer, shards: Path, seq_len: int, batch: int = 16) -> float:
    """Return nats a token over the whole held-out split, cut in windows of `seq_len`, in fp32; the ends of documents count."""
    tokens = torch.from_numpy(open_split(shards, "heldout").tokens.astype("int64"))
    rows = (len(tokens) - 1) // seq_len
    inputs, targets = tokens[: rows * seq_len].view(rows, seq_len), tokens[1 : rows * seq_len + 1].view(rows, seq_len)
    total = sum(float(causal_lm_loss(model, (x, y))[0]) for x, y in zip(inputs.split(batch), targets.split(batch)))
    return total / targets.numel()


def run_arm(shards: Path, size: str, name: str, seed: int, times: dict[str, dict]) -> dict:
    """Train one arm for its time and score it; returns the row of the record."""
    arm = all_arms(size)[name]
    steps = steps_within(size, arm, times[timing_key(size, arm)]["ratios"])
    run = Run(shards, size, arm, seed, steps)
    with open_workers(1) as workers:
        losses = [run.step(step, workers) for step in range(steps)]
        model = run.masters.model.float()
        run.masters.publish()
        heldout = heldout_loss(model, shards, run.size.seq_len)
    return {
        "size": size, "arm": name, "seed": seed, "steps": steps, "tokens": run.schedule.tokens(steps), "heldout_nats": heldout,
        "train_nats": statistics.fmean(losses[-max(1, steps // 20) :]), "body_params": count_params(run.config)["non_embedding"],
        "change": asdict(arm) | {"rates": run.size.rates[arm.optimizer.get("name", "muon")]},
    }  # fmt: skip


def prepare(folder: Path) -> None:
    """Curate the standard library, train a tokenizer of 4,096 entries on it, and pack it."""
    import pyarrow.parquet as pq

    from plinth.data.curate import CurateConfig, curate
    from plinth.data.shards import pack_corpus
    from plinth.data.stdlib import stdlib_documents
    from plinth.tokenizer.train import train_tokenizer

    curate(stdlib_documents(), folder / "corpus", CurateConfig(heldout_fraction=0.02))
    texts = pq.read_table(folder / "corpus" / "train.parquet", columns=["text"]).column("text").to_pylist()
    tokenizer = train_tokenizer(texts, SIZES["1M"].vocab_size)
    tokenizer.save(folder / "tokenizer")
    pack_corpus(folder / "corpus", tokenizer, folder / "shards")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "time", "run", "report"))
    parser.add_argument("--data", type=Path, required=True, help="folder for text, times and results")
    parser.add_argument("--size", choices=list(SIZES), action="append", help="default: all")
    parser.add_argument("--arms", nargs="+", help="default: all but the sweep; `sweep` stands for the sweep")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    folder, shards = options.data, options.data / "shards"
    if options.command == "prepare":
        prepare(folder)
    elif options.command == "report":
        from ablations.report import write_report

        print(write_report(folder))
    for size in options.size or list(SIZES):
        names = options.arms or list(ARMS)
        names = [arm for name in names for arm in (SWEEPS[size] if name == "sweep" else [name])]
        if options.command == "time":
            for name in names:
                path = folder / f"times_{size}.json"
                known = json.loads(path.read_text()) if path.exists() else {}
                key = timing_key(size, all_arms(size)[name])
                if key not in known:
                    known[key] = time_arm(shards, size, all_arms(size)[name])
                    path.write_text(json.dumps(known, indent=1))
                    print(size, name, known[key], flush=True)
        elif options.command == "run":
            run_all(folder, size, names, options.seeds)
    return 0


def run_all(folder: Path, size: str, names: list[str], seeds: list[int]) -> None:
    """Run what is not among the results yet, seed by seed."""
    results = folder / "results.jsonl"
    times = json.loads((folder / f"times_{size}.json").read_text())
    for seed in seeds:
        for name in names:
            done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
            if any((row["size"], row["arm"], row["seed"]) == (size, name, seed) for row in done):
                continue
            row = run_arm(folder / "shards", size, name, seed, times)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{size} {name} seed {seed}: {row['heldout_nats']:.4f} nats held out, {row['steps']} steps", flush=True)


if __name__ == "__main__":
    sys.exit(main())
