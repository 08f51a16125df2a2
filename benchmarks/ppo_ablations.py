"""What does each detail of PPO change, alone, in short runs on the world of reviews?

    python benchmarks/ppo_ablations.py                       # some ten minutes on one core; writes benchmarks/records/ppo_ablations.json
    python benchmarks/ppo_ablations.py --arm "no whitening"  # these again; the other rows stay

Every arm is the default but for one switch, on the same prompts from the same finetuned model (reviews_world.py); the default is run with
several seeds, whose spread says what a difference means. Rewards are means over answers to held-out prompts. Short runs: an arm
that is no worse here may be so where answers are longer, rewards larger, or the critic better.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ppo_gold import measured

from plinth.config import to_dict
from plinth.posttraining.ppo import train_ppo
from plinth.posttraining.ppo_config import PpoConfig
from plinth.posttraining.rollouts import SampleConfig
from plinth.training.optim import OptimizerConfig
from record import RECORDS, write_record
from reviews_world import ready

SEEDS = (0, 1, 2)
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-3, beta2=0.999, eps=1e-5, weight_decay=0.0)
DEFAULT = PpoConfig(
    train=replace(PpoConfig().train, optimizer=OPTIMIZER), sample=SampleConfig(group_size=1, max_tokens=56), completions=1024,
    prompts_per_rollout=64, epochs=2, minibatches=2,
)  # fmt: skip
Change = Callable[[PpoConfig], PpoConfig]


def section(name: str, **values: Any) -> Change:
    """Return the change of some fields of one part of the configuration."""
    return lambda config: replace(config, **{name: replace(getattr(config, name), **values)})


def top(**values: Any) -> Change:
    return lambda config: replace(config, **values)


def optimizer(**values: Any) -> Change:
    return lambda config: replace(config, train=replace(config.train, optimizer=replace(config.train.optimizer, **values)))


COOL = SampleConfig(group_size=1, max_tokens=56, temperature=0.7)
# one arm an item, then further ones
ARMS: dict[str, tuple[str, Change]] = {
    "critic sees no prompt": ("1", section("critic", reads_prompt=False)),
    "left padding, positions not adjusted": ("3", section("prompt", padding="left_unadjusted")),
    "fixed length": ("4", section("end", fixed_length=True)),
    "constant rate": ("5", section("train", decay_fraction=0.0)),
    "score behind the end (TRL)": ("7", section("reward", place="past_end")),
    "critic's head drawn": ("8, 11", section("critic", head="normal")),
    "scores normalised": ("9", section("reward", normalise=True)),
    "temperature 0.7": ("10", top(sample=COOL)),
    "prompts that begin with Review": ("12", section("prompt", pattern="^Review")),
    "dropout 0.1": ("13", top(dropout=0.1)),
    "no end: score -1": ("14", section("end", missing_score=-1.0)),
    "discount 0.95": ("15", section("advantage", gamma=0.95)),
    "each pass in the same order": ("16", top(reshuffle=False)),
    "KL off the score at once": ("17", section("kl", per_token=False)),
    "no whitening": ("18", section("advantage", whiten=False)),
    "no value clip": ("19", section("critic", clip=None)),
    "KL adapts to 3 nats": ("20", section("kl", target=3.0, horizon=1000)),
    "TensorFlow's epsilon": ("21", optimizer(tensorflow_eps=True)),
    "trunk shared": ("N+", section("critic", trunk="shared")),
    "temperature 0.7 in sampling only": ("10", top(sample=COOL, train_at_temperature=False)),
    "KL in the loss": ("17", lambda c: replace(c, kl=replace(c.kl, coef=0.0), policy=replace(c.policy, kl_coef=0.05))),
    "rewards whitened too": ("18", section("reward", whiten=True)),
    "whitening over an update": ("18", section("advantage", over="minibatch")),
    "biased variance": ("18", section("advantage", unbiased=False)),
    "critic's rate × 3": ("N+", section("critic", lr_factor=3.0)),
    "λ = 1": ("", section("advantage", lam=1.0)),
    "ratio not clipped": ("", section("policy", epsilon_low=1.0, epsilon_high=1e9)),
    "cut at a full stop, else score -1": ("14", section("end", truncate_at=".", truncate_from=16, missing_score=-1.0)),
    "scores clipped to ± 0.25": ("", section("reward", clip=0.25)),
    "negative advantages bounded": ("", section("policy", dual_clip=3.0)),
}


def switches(change: Change) -> str:
    """Return what an arm changes of the default, as a reader would set it."""

    def flat(part: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        items = ((f"{prefix}{name}", value) for name, value in part.items())
        return {key: leaf for name, value in items for key, leaf in leaves(name, value)}

    def leaves(name: str, value: Any) -> Iterable[tuple[str, Any]]:
        return flat(value, f"{name}.").items() if isinstance(value, dict) else [(name, value)]

    before, after = flat(to_dict(DEFAULT)), flat(to_dict(change(DEFAULT)))
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in after.items() if before[name] != value)


def run_arm(folder: Path, change: Change, seed: int) -> dict[str, Any]:
    """Train one arm and return what it learnt."""
    config = change(replace(DEFAULT, train=replace(DEFAULT.train, seed=seed, num_threads=1)))
    out = folder / "ppo_arm"
    shutil.rmtree(out, ignore_errors=True)
    run = train_ppo(out, folder / "sft", "reviews", folder / "world" / "prompts.jsonl", config)
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    return {**measured(folder, run.path, 1), "explained_variance": last["explained_variance"], "train_s": run.summary["time_s"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/reviews"), help="folder for text and runs")
    parser.add_argument("--arm", action="append", choices=["default", *ARMS], help="default: all that the record lacks")
    options = parser.parse_args()
    folder, path = ready(options.data), RECORDS / "ppo_ablations.json"
    torch.set_num_threads(1)
    known = {(row["arm"], row["seed"]): row for row in (json.loads(path.read_text())["rows"] if path.exists() else [])}
    wanted = [("default", seed) for seed in SEEDS] + [(name, 0) for name in ARMS]
    for name, seed in wanted:
        if name in (options.arm or []) or (options.arm is None and (name, seed) not in known):
            item, change = ARMS.get(name, ("", lambda config: config))
            known[name, seed] = {"arm": name, "item": item, "switch": switches(change), "seed": seed, **run_arm(folder, change, seed)}
            print(known[name, seed], file=sys.stderr, flush=True)
            rows = [known[key] for key in wanted if key in known]
            write_record("ppo_ablations", "What does each detail of PPO change, alone?", rows, completions=DEFAULT.completions)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
