"""What do the methods of preference tuning make of one model and one file of pairs, where the reward of every answer is known?

    python benchmarks/preference_table.py --data runs/reviews     # about ten minutes on two cores; --quick tries the way through in one

The world is `plinth.tasks.reviews`, whose reward is a rule and whose best policy at every KL is computed. A model finetuned on its
reviews is tuned by each method on the same pairs with the same rates, steps and seed; then it answers held-out prompts, and its own
answers are scored: gold reward, KL to the finetuned model (mean log π/π_ref of what it wrote), length, and how often its answer is worth
more than the finetuned model's to the same prompt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from plinth.evaluation.statistics import mean_score, paired_difference
from plinth.inference.best_of import best_of_kl
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.posttraining.preference import train_dpo
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.rollouts import Rollouts, SampleConfig, Sampler
from plinth.tasks.reviews import best_mean, prompts, reward
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from record import write_record
from reviews_world import ready

LR, MUON_LR, EPOCHS, PAIRS_PER_STEP = 5e-4, 1.5e-3, 2.0, 64
METHODS: dict[str, dict[str, Any]] = {
    "chosen only": {"loss": "sft"},
    "DPO": {"loss": "sigmoid", "chosen_nll_coef": 0.0},
    "cDPO": {"loss": "cdpo", "epsilon": 0.1},
    "IPO": {"loss": "ipo"},
    "KTO": {"loss": "kto", "pairs_per_step": 2 * PAIRS_PER_STEP, "micro_batch_size": 64},
    "APO-zero": {"loss": "apo_zero"},
    "ORPO": {"loss": "orpo"},
    "SimPO": {"loss": "simpo"},
}
"""loss and what differs from its defaults; a pair is two rows for KTO"""
ANSWERS, BEST_OF, MAX_TOKENS = 16, 4, 64


def tune(folder: Path, out: Path, method: dict[str, Any], steps: int | None, threads: int, seed: int) -> dict[str, Any]:
    """Train one method and return its summary."""
    optimizer = OptimizerConfig(lr=LR, muon_lr=MUON_LR)
    train = TrainConfig(steps=steps, warmup_steps=5, keep_pre_decay=False, optimizer=optimizer, num_threads=threads, seed=seed)
    config = DpoConfig(**{"train": train, "epochs": EPOCHS, "pairs_per_step": PAIRS_PER_STEP, "micro_batch_size": 32} | method)
    return train_dpo(out, folder / "sft", folder / "world" / "pairs.jsonl", config).summary or {}


class Judge:
    """Samples answers to the held-out prompts and scores them, always with the same seed."""

    def __init__(self, folder: Path, threads: int, answers: int):
        self.tokenizer, self.threads, self.answers = Tokenizer.load(folder / "sft" / "model"), threads, answers
        self.reference = load_decoder(folder / "sft" / "model")
        self.prompts = prompts("heldout")
        self.asked = [render(self.tokenizer, [{"role": "user", "content": p}], add_generation_prompt=True).tokens for p in self.prompts]

    def rewards(self, rollouts: Rollouts) -> list[list[float]]:
        """Return the gold rewards of each prompt's answers."""
        size = rollouts.group_size
        texts = [self.tokenizer.decode(rollouts.answer_tokens(i)) for i in range(len(rollouts))]
        return [[reward(prompt, text) for text in texts[i * size : (i + 1) * size]] for i, prompt in enumerate(self.prompts)]

    def sample(self, model: Transformer, answers: int, seed: int) -> tuple[Rollouts, list[float]]:
        """Return answers, and of each log π − log π_ref in nats, which averages to the KL to the reference."""
        sampler = Sampler(model, self.tokenizer.end_ids, SampleConfig(group_size=answers, max_tokens=MAX_TOKENS), self.threads)
        try:
            found = sampler.sample(self.asked, [seed])
            rows = found.rows(self.tokenizer.pad_id or 0)
            return found, (rows["log_probs"] - sampler.score(rows, self.reference)).sum(1).tolist()
        finally:
            sampler.close()


def comparisons(rewards: list[list[float]], others: list[list[float]]) -> tuple[list[float], list[int]]:
    """Return 1, 0 or for a tie a half for each own answer against each other one to its prompt, and the prompts' numbers."""
    found = [((a > b) + 0.5 * (a == b), i) for i, (own, other) in enumerate(zip(rewards, others)) for a in own for b in other]
    wins, clusters = zip(*found)
    return list(wins), list(clusters)


def optimum_at(kl: float) -> float:
    """Return the best mean reward that any policy has at a KL to the grammar of the reviews."""
    low, high = 1e-3, 1e3  # of beta, which the KL falls with
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if best_mean(middle)[0] > kl else (low, middle)
    return best_mean(low)[1]


def measured(rewards: list[list[float]], baseline: list[list[float]], kl: float, kl_stderr: float, rollouts: Rollouts) -> dict[str, Any]:
    """Return a row of the table."""
    means = [sum(values) / len(values) for values in rewards]
    score = paired_difference(means, [0.0] * len(means))
    wins = mean_score(*comparisons(rewards, baseline))
    lengths = [len(tokens) for tokens in rollouts.completions]
    return {
        "reward": score.value, "reward_ci95": score.ci95, "kl_nats": kl, "kl_stderr": kl_stderr, "optimum_at_kl": optimum_at(kl),
        "tokens": sum(lengths) / len(lengths), "unfinished": 1 - sum(rollouts.finished) / len(rollouts), "wins": wins.value,
        "wins_ci95": wins.ci95,
    }  # fmt: skip


def run(folder: Path, steps: int | None, threads: int, answers: int, seed: int) -> list[dict[str, Any]]:
    """Return the table's rows: the finetuned model, the best of several of its answers, and each method."""
    ready(folder, threads)
    judge = Judge(folder, threads, answers)
    many, _ = judge.sample(judge.reference, answers * (1 + BEST_OF), seed)
    every = judge.rewards(many)
    baseline = [values[:answers] for values in every]
    best = [[max(values[answers + BEST_OF * i : answers + BEST_OF * (i + 1)]) for i in range(answers)] for values in every]
    size = many.group_size
    first = Rollouts(
        many.prompts, answers, *([part[g * size + i] for g in range(len(many.prompts)) for i in range(answers)]
        for part in (many.completions, many.log_probs, many.finished)),
    )  # fmt: skip
    rows = [{"name": "SFT"} | measured(baseline, baseline, 0.0, 0.0, first)]
    rows.append({"name": f"best of {BEST_OF} by the gold reward"} | measured(best, baseline, best_of_kl(BEST_OF), 0.0, first))
    rows[-1] |= {"tokens": None, "unfinished": None}
    for name, method in METHODS.items():
        out = folder / "tuned" / name.replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        summary = tune(folder, out, method, steps, threads, seed)
        trained_s = time.perf_counter() - began
        rollouts, ratios = judge.sample(load_decoder(out / "model"), answers, seed + 1)
        kl = paired_difference(ratios, [0.0] * len(ratios), clusters=[i // answers for i in range(len(ratios))])
        row = {"name": name} | measured(judge.rewards(rollouts), baseline, kl.value, kl.stderr, rollouts)
        told = {key: summary[key] for key in ("accuracy", "margin", "chosen_ratio", "rejected_ratio", "chosen_fell") if key in summary}
        rows.append(row | {"trained": told, "steps": summary["steps"], "time_s": trained_s, "options": method})
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/reviews"), help="folder for text and runs; what is there is kept")
    parser.add_argument("--threads", type=int, default=2, help="cores")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and sampling")
    parser.add_argument("--quick", action="store_true", help="three updates and two answers a prompt: the way through, no numbers")
    options = parser.parse_args()
    began = time.perf_counter()
    rows = run(options.data, 3 if options.quick else None, options.threads, 2 if options.quick else ANSWERS, options.seed)
    time_s = time.perf_counter() - began
    print(json.dumps({"time_s": round(time_s, 1), "rewards": {row["name"]: round(row["reward"], 3) for row in rows}}))
    if not options.quick:
        question = "What do the methods of preference tuning make of one model and one file of pairs?"
        settings = {"lr": LR, "muon_lr": MUON_LR, "epochs": EPOCHS, "pairs_per_step": PAIRS_PER_STEP, "answers_per_prompt": ANSWERS}
        write_record(
            "preference_table", question, rows, time_s=time_s, threads=options.threads, prompts=len(prompts("heldout")), **settings
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
