"""Plinth's side of posttraining_peers.py: the functions behind `plinth sft`, `prefer`, `reward` and `grpo`, in a process of its own.

    python benchmarks/posttraining_sides.py TASK SETTINGS FOLDER THREADS

Reads one JSON object a line, {"examples", "per_step"}, trains one epoch on so many from the weights in FOLDER, and answers with its
seconds, its processor's seconds, updates, the first update's loss and norm of the gradient, and the process's largest memory so far. What
is computed once before the first update, the reference's log-probabilities, is within the seconds. With the settings float32 or bfloat16
the optimizer is AdamW and an update has as many examples as the peers'; with defaults both are ours.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from plinth.models.hub import save_model
from plinth.posttraining import grpo, grpo_config, preference, reward_tuning, sft
from plinth.posttraining.rewards import RewardConfig
from plinth.posttraining.rollouts import SampleConfig
from plinth.run import Run
from plinth.training import job
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

LR, BETA = 1e-5, 0.1


class Side:
    """One task under one of the settings."""

    def __init__(self, task: str, settings: str, folder: Path, threads: int):
        self.task, self.settings, self.folder, self.threads = task, settings, folder, threads

    def run(self, work: dict[str, int]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            run, spent = getattr(self, self.task)(Path(place), work)
            first = run.metrics()[0]
            return {
                "seconds": run.summary["time_s"] + spent["before_s"], "updates": run.summary["steps"], **spent,
                "loss": first["loss_nats"], "grad_norm": first["grad_norm"],
            }  # fmt: skip

    def train(self, default: TrainConfig) -> TrainConfig:
        if self.settings == "defaults":
            return replace(default, num_threads=self.threads)
        optimizer = OptimizerConfig(name="adamw", lr=LR)
        return replace(default, dtype=self.settings, num_threads=self.threads, optimizer=optimizer)

    def sizes(self, name: str, work: dict[str, int]) -> dict[str, int]:
        """Return the peers' examples an update, two micro-batches for each thread; by default nothing."""
        if self.settings == "defaults":
            return {}
        return {name: work["per_step"], "micro_batch_size": max(1, work["per_step"] // self.threads // 2)}

    def first(self, name: str, place: Path, count: int) -> Path:
        """Return a file of the first so many examples."""
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (place / "data.jsonl").write_text("".join(lines))
        return place / "data.jsonl"

    def sft(self, place: Path, work: dict[str, int]) -> tuple[Run, dict[str, float]]:
        config = sft.SftConfig(epochs=1, **self.sizes("conversations_per_step", work))
        config = replace(config, train=self.train(config.train))
        data = self.first("sft", place, work["examples"])
        return timed(sft, lambda: sft.train_sft(place / "run", self.folder / "hf", data, config))

    def dpo(self, place: Path, work: dict[str, int]) -> tuple[Run, dict[str, float]]:
        same = {} if self.settings == "defaults" else {"chosen_nll_coef": 0.0, "beta": BETA}
        config = preference.DpoConfig(epochs=1, **self.sizes("pairs_per_step", work), **same)
        config = replace(config, train=self.train(config.train))
        data = self.first("pairs", place, work["examples"])
        return timed(preference, lambda: preference.train_dpo(place / "run", self.folder / "hf", data, config))

    def reward(self, place: Path, work: dict[str, int]) -> tuple[Run, dict[str, float]]:
        same = {} if self.settings == "defaults" else {"center_coef": 0.0}
        sizes = self.sizes("prompts_per_step", work)
        config = reward_tuning.RewardTuning(epochs=1, held_out_share=0.0, normalise="none", **sizes, **same)
        config = replace(config, train=self.train(config.train))
        data = self.first("pairs", place, work["examples"])
        return timed(reward_tuning, lambda: reward_tuning.train_reward(place / "run", self.folder / "hf-reward", data, config))

    def grpo(self, place: Path, work: dict[str, int]) -> tuple[Run, dict[str, float]]:
        config = grpo_config.GrpoConfig(
            sample=SampleConfig(group_size=work["group"], max_tokens=work["new"]), reward=RewardConfig(("random",)),
            prompts_per_rollout=work["per_step"], rollouts=work["examples"] // work["per_step"],
            **({} if self.settings == "defaults" else {"micro_batch_size": -(-work["per_step"] // self.threads) * work["group"]}),
        )  # fmt: skip
        config = replace(config, train=self.train(config.train))
        data = self.first("prompts", place, work["examples"])
        return timed(grpo, lambda: grpo.train_grpo(place / "run", self.folder / "hf", data, config))


def timed(stage: Any, train: Callable[[], Run]) -> tuple[Run, dict[str, float]]:
    """Return the run, the seconds before its first update that come once, and the processor's seconds of these and all updates."""
    spent: dict[str, float] = {}

    def run_job(out: Path, name: str, config: Any, prepare: Callable[[Any], job.Job], **more: Any) -> Run:
        def prepared(resolved: Any) -> job.Job:
            made = prepare(resolved)

            def begin(run: Run, config: Any) -> None:
                spent["processor_s"] = -time.process_time()
                began = time.perf_counter()
                made.begin(run, config)
                spent["before_s"] = time.perf_counter() - began

            def publish(folder: Path) -> None:
                spent["processor_s"] += time.process_time()
                (made.publish or (lambda folder: save_model(made.model, made.tokenizer, folder)))(folder)

            return replace(made, begin=begin, publish=publish)

        return job.run_job(out, name, config, prepared, **more)

    stage.run_job = run_job
    return train(), spent


def main() -> None:
    task, settings, folder, threads = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    side = Side(task, settings, folder, threads)
    print(json.dumps({"ready": True, "versions": {}}), flush=True)
    for line in sys.stdin:
        answer = side.run(json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer | {"peak_memory_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
